"""Healing: a short fine-tune of a finished student with the dense model as teacher."""

from factorllm.heal.run import heal
from factorllm.heal.settings import HealSettings
from factorllm.heal.trainer import FactorTrainer

__all__ = ["FactorTrainer", "HealSettings", "heal"]
