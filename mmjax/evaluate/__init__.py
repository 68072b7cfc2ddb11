"""Evaluation of a model: published benchmarks, choices ranked by their loss, and the embedded default's scenes."""

from mmjax.evaluate.rank import Choices
from mmjax.evaluate.scenes import ROWS, ScenesScore, report_scenes, score_job, score_scenes

__all__ = ["ROWS", "Choices", "ScenesScore", "report_scenes", "score_job", "score_scenes"]
