"""What a conversion cost and gained, for people: the table in the terminal and the model card."""

from factorllm.report.card import model_card
from factorllm.report.scores import SCORES, chain_table, score_table
from factorllm.report.summary import RUN_FILE, ModelRow, Spent, Summary, layer_table, read_summary, result_table

__all__ = [
    "RUN_FILE",
    "SCORES",
    "ModelRow",
    "Spent",
    "Summary",
    "chain_table",
    "layer_table",
    "model_card",
    "read_summary",
    "result_table",
    "score_table",
]
