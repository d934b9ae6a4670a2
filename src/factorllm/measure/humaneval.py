"""HumanEval: lm-eval's own prompt, end of the answer and counting; the programs are run here, not in its process."""

from __future__ import annotations

from factorllm.measure.programs import deciding, passes


def pass_at_1(references: list[str], predictions: list[list[str]], **_) -> float:
    """Of one problem: 1 if the program that was written passes the problem's tests, else 0.

    Args:
        references: the tests, with the call of them.
        predictions: programs, one.
    """
    # As lm-eval's code_eval joins them. That one comes from the hub, and runs programs without these limits.
    return float(passes(f"{predictions[0][0]}\n{references[0]}"))


def _whole_programs(answers: list[list[str]], problems: list[dict]) -> list[list[str]]:
    """The beginning that the model was given, and what it wrote."""
    return [[problem["prompt"] + one for one in written] for written, problem in zip(answers, problems, strict=True)]


HUMANEVAL = {
    "output_type": "generate_until",
    "unsafe_code": True,
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "num_fewshot": 0,
    "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": _whole_programs}]}],
    "metric_list": [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}],
}
"""Of lm-eval's task `humaneval`, what is not its data and its prompt."""


def definition() -> dict:
    """What decides a score besides the model, its prompt and the problems; as JSON has it."""
    settings = {key: value for key, value in HUMANEVAL.items() if key not in ("filter_list", "metric_list")}
    return settings | {"run": deciding()}
