"""`heal --supervise`: torch's elastic agent starts the processes, and starts them again when one dies or hangs."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from factorllm.errors import FactorLLMError
from factorllm.healing.failures import rule_of

_RESTARTS = 3
_AGENT = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # seconds for the others to end by themselves; a stopped one never does
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else gloo finds the addresses of the processes before, which are gone
}
_REFUSED = "FACTORLLM_REFUSED"
"""Variable with the path of a file that is there once a process has refused: to start it again would not help."""


def supervise(words: list[str], processes: int) -> bool:
    """Run a factorllm command in processes that are started again, at most three times, and go on where they were.

    Args:
        words: of the command, after `factorllm`.

    Returns:
        Whether it was done; else the processes have said what they refuse.

    Raises:
        FactorLLMError: when it has failed each time.
    """
    os.environ |= _AGENT
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(uuid4()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=_RESTARTS, monitor_interval=0.5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        refused = Path(folder) / "refused"
        os.environ[_REFUSED] = str(refused)
        try:
            elastic_launch(config, sys.executable)("-m", "factorllm.healing.supervise", *words)
        except ChildFailedError as error:
            if refused.exists():
                return False
            raise _refusal(error) from error
        return not refused.exists()


def _refusal(error: ChildFailedError) -> FactorLLMError:
    _, failure = error.get_first_failure()
    said = f"{failure.message} exitcode: {failure.exitcode}" if failure.exitcode < 0 else f"code {failure.exitcode}"
    rule = rule_of(said)
    hint = rule.hint if rule else "what it printed says why; repeat the command, and it goes on where it stopped"
    return FactorLLMError(f"healing was started {_RESTARTS + 1} times, and a process ended each time ({said}); {hint}")


def _work() -> None:
    """One of the processes. It ends well when it refuses, for else it would be started again."""
    from factorllm.cli import main

    if os.environ["WORLD_SIZE"] == "1":  # alone, it is as if it had been started by hand
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    sys.argv[0] = "factorllm"
    try:
        main()
    except SystemExit as end:
        if end.code == 2:
            Path(os.environ[_REFUSED]).touch()
            raise SystemExit(0) from None
        raise


if __name__ == "__main__":
    _work()
