"""A vision-language judge of pairs of pictures, each pair in both orders (Multi-LoRA Composition, 2402.16843).

prompt    elements -> the question                 client    one request, one answer; keeps the key secret
pictures  a file -> a data URL for the request     pair      both orders of one pair -> a verdict
parse     an answer -> scores                      run       many pairs at once
summary   verdicts -> wins, ties, losses with intervals
"""

from __future__ import annotations

from molecli.metrics.judge.client import read_key
from molecli.metrics.judge.pair import Failure, Judgement, Pair, Verdict
from molecli.metrics.judge.run import judge_pairs
from molecli.protocols import Element

__all__ = ["Element", "Failure", "Judgement", "Pair", "Verdict", "judge_pairs", "read_key"]
