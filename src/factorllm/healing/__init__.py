"""Healing: a short fine-tune of a finished student with the dense model as teacher."""

from factorllm.healing.run import heal
from factorllm.healing.settings import HealSettings
from factorllm.healing.trainer import FactorTrainer

__all__ = ["FactorTrainer", "HealSettings", "heal"]
