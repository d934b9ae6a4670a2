"""Healing: a short fine-tune of a finished student with the dense model as teacher."""
