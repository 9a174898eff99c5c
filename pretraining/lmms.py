"""A BLIP3-o checkpoint as a model of lmms-eval, for the understanding benchmarks.

`register()` makes the name "blip3o" known to lmms-eval's registry; call it before lmms-eval reads its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..blip3o_core.errors import BadInputError

if TYPE_CHECKING:
    from ..blip3o_core.pipeline import Blip3oPipeline

LONGEST_ANSWER = 128


def answer_requests(
    pipeline: Blip3oPipeline,
    requests: Sequence[tuple[Any, ...]],
    document_of: Callable[[str, str, Any], Any],
    batch_size: int = 8,
) -> list[str]:
    """Answers to lmms-eval's generate_until requests, in order.

    Args:
        requests: (question, generation arguments, pictures of a document, document id, task, split), as lmms-eval
            passes them. Of the generation arguments `max_new_tokens`, `temperature` and `until` are followed.
        document_of: the document of (task, split, id).
    """
    from ..blip3o_core.understanding import AnswerSettings

    answers: list[str] = []
    for start in range(0, len(requests), batch_size):
        groups: dict[AnswerSettings, list[int]] = {}
        part = requests[start : start + batch_size]
        for n, (_, options, *_rest) in enumerate(part):
            settings = AnswerSettings(
                max_new_tokens=options.get("max_new_tokens", LONGEST_ANSWER),
                temperature=options.get("temperature") or 0.0,
            )
            groups.setdefault(settings, []).append(n)
        found: dict[int, str] = {}
        for settings, rows in groups.items():
            questions, pictures = [], []
            for n in rows:
                question, _, visuals_of, document_id, task, split = part[n]
                questions.append(question.replace("<image>", "").strip())
                visuals = visuals_of(document_of(task, split, document_id))
                pictures.append([_picture(visual) for visual in visuals])
            for n, answer in zip(rows, pipeline.ask(questions, pictures, settings=settings), strict=True):
                found[n] = _until(answer, part[n][1].get("until", []))
        answers += [found[n] for n in range(len(part))]
    return answers


def register() -> type:
    """The model class, registered with lmms-eval as "blip3o".

    Raises:
        BadInputError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.api.model import lmms
        from lmms_eval.api.registry import register_model
    except ImportError as error:
        raise BadInputError(
            "lmms-eval is not installed.\nInstall it, then run its benchmarks with this model."
        ) from error
    from ..blip3o_core.pipeline import load_pipeline

    @register_model("blip3o")
    class Blip3oForLmms(lmms):
        """Answers with the backbone; likelihood scores and multi-round tasks are not offered."""

        def __init__(
            self, pretrained: str, batch_size: int = 8, device: str = "auto", **unused: object
        ) -> None:
            super().__init__()
            self.pipeline = load_pipeline(pretrained, device=device)
            self.batch_size = int(batch_size)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return answer_requests(
                self.pipeline,
                [request.args for request in requests],
                lambda task, split, number: self.task_dict[task][split][number],
                self.batch_size,
            )

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError(
                "This adapter answers in words; choose tasks of the kind generate_until."
            )

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("This adapter answers single questions; choose single-round tasks.")

    return Blip3oForLmms


def _picture(visual: Any) -> Image.Image:
    return (visual if isinstance(visual, Image.Image) else Image.open(visual)).convert("RGB")


def _until(answer: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()
