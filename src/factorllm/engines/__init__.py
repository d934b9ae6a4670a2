"""Inference engines behind one interface, each model in a process of its own."""

from factorllm.engines.base import Engine, Options
from factorllm.engines.process import ENGINES, EngineProcess, check_installed, engine_name, installed

__all__ = ["ENGINES", "Engine", "EngineProcess", "Options", "check_installed", "engine_name", "installed"]
