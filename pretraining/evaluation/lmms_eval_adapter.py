"""A BLIP3-o checkpoint as a model of lmms-eval, which scores answers about pictures (MME, MMMU, VQAv2, MM-Vet, ...).

lmms-eval finds it by an entry point of the group "lmms_eval.models" that names `manifest`, or, without one, after
register(); then:  lmms-eval --model blip3o --model_args pretrained=FOLDER --tasks mme --batch_size 8

Tasks that compare likelihoods ("output_type: multiple_choice") fail in lmms-eval 0.7.3 with every model: its evaluator
turns (loss, is greedy) into text before the task reads it. Tasks that generate answers are not affected.

lmms-eval is imported only when the model class is asked for. Source of the interface: lmms-eval 0.7.3,
lmms_eval/api/model.py, api/task.py (shapes of the requests) and models/registry_v2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ...blip3o_core.errors import BadInputError, MissingFilesError
from .benchmarks import process_device

if TYPE_CHECKING:
    from PIL import Image

    from ...blip3o_core.language.answers import AnswerSettings
    from ...blip3o_core.pipeline import Blip3oPipeline

MODEL_ID = "blip3o"
CLASS_NAME = "Blip3oModel"
MAX_NEW_TOKENS = 128
# What other models' prompt templates write into questions; here pictures always come before the text.
PICTURE_PLACEHOLDERS = ("<image>",)


def manifest() -> Any:
    """lmms-eval's description of the model: a name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.{CLASS_NAME}")


def register() -> None:
    """Make the model known to lmms-eval in this process, for scripts that call its evaluator."""
    _import_lmms_eval()
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def __getattr__(name: str) -> Any:
    # lmms-eval asks this module for the class by name; its base class exists only where lmms-eval is installed.
    if name == CLASS_NAME:
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def model_class() -> type:
    """The class lmms-eval creates from --model_args.

    Raises:
        MissingFilesError: lmms-eval is not installed.
    """
    base = _import_lmms_eval().lmms

    class Blip3oModel(base):
        """Answers by a checkpoint.

        Args:
            pretrained: checkpoint folder.
            batch_size: questions answered together.
            device, dtype: see load_pipeline; with several processes each takes its own GPU.
            min_pixels, max_pixels: area at which pictures are looked at.
            system_prompt: None = the published one.
            pipeline: a loaded checkpoint instead of `pretrained`.
        """

        is_simple = True

        def __init__(
            self,
            pretrained: str = "",
            *,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
            device: str = "auto",
            dtype: str = "auto",
            min_pixels: int | None = None,
            max_pixels: int | None = None,
            system_prompt: str | None = None,
            pipeline: Blip3oPipeline | None = None,
        ) -> None:
            super().__init__()
            if not str(batch_size).isdigit() or int(batch_size) < 1:
                raise BadInputError(
                    f'The batch size "{batch_size}" is no number.\nGive --batch_size 8 or another.'
                )
            self.batch_size = int(batch_size)
            if max_batch_size is not None:
                self.batch_size = min(self.batch_size, int(max_batch_size))
            self.pipeline = pipeline or _load(pretrained, device, dtype)
            self.system_prompt = system_prompt
            self.limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}

        @property
        def device(self) -> Any:
            """Where the model computes; lmms-eval gathers the numbers of several processes there."""
            return self.pipeline.device

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Answers, in the order of the requests.

            Each request's args are (question, options, doc -> pictures, number, task, split).
            """
            answers: list[str] = [""] * len(requests)
            by_options: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                by_options.setdefault(repr(sorted(request.args[1].items())), []).append(place)
            for places in by_options.values():
                options = requests[places[0]].args[1]
                settings, until = answer_settings(options), stop_texts(options)
                for batch in _batches(places, self.batch_size):
                    written = self._answer([requests[place].args for place in batch], settings)
                    for place, answer in zip(batch, written, strict=True):
                        answers[place] = cut_answer(answer, until)
                        question = requests[place].args[0]
                        self.cache_hook.add_partial("generate_until", (question, options), answers[place])
            return answers

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """For each request (mean loss of a token, is the likeliest answer).

            As all models of lmms-eval do: it takes the answer of the *smallest* number (api/task.py), whatever the
            method is called. Args are (question, answer or doc -> answer, doc -> pictures, number, task, split), or
            (question, answer) for an answer by itself.
            """
            return [self._loss(*request.args) for request in requests]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Refused.

            Raises:
                BadInputError: always.
            """
            raise BadInputError(
                "Tasks in several rounds cannot be scored with BLIP3-o.\nLeave them out of --tasks."
            )

        def _answer(self, batch: Sequence[tuple], settings: AnswerSettings) -> list[str]:
            from ...blip3o_core.language.answers import Turn

            chats = [
                [Turn("user", clean_question(question), self._pictures(pictures_of, number, task, split))]
                for question, _, pictures_of, number, task, split in batch
            ]
            options = {} if self.system_prompt is None else {"system_prompt": self.system_prompt}
            return self.pipeline.chat(chats, settings=settings, **options, **self.limits)

        def _loss(
            self,
            question: str,
            answer: str | Callable[[Any], Any],
            pictures_of: Callable[[Any], Sequence[Any]] | None = None,
            number: int = 0,
            task: str = "",
            split: str = "",
        ) -> tuple[float, bool]:
            if callable(answer):
                answer = str(answer(self.task_dict[task][split][number]))
            pictures = () if pictures_of is None else self._pictures(pictures_of, number, task, split)
            return answer_loss(
                self.pipeline,
                clean_question(question),
                # The delimiter between question and answer belongs to templates without turns.
                answer.strip(),
                pictures,
                system_prompt=self.system_prompt,
                **self.limits,
            )

        def _pictures(
            self, pictures_of: Callable[[Any], Sequence[Any]], number: int, task: str, split: str
        ) -> tuple[Image.Image, ...]:
            return to_pictures(pictures_of(self.task_dict[task][split][number]), task)

    Blip3oModel.__module__, Blip3oModel.__qualname__ = __name__, CLASS_NAME
    return Blip3oModel


def answer_settings(options: dict[str, Any]) -> AnswerSettings:
    """A task's generation options as ours.

    Raises:
        BadInputError: beam search.
    """
    from ...blip3o_core.language.answers import AnswerSettings

    if (options.get("num_beams") or 1) != 1:
        raise BadInputError(
            f"The task wants {options['num_beams']} beams; BLIP3-o answers without beam search.\n"
            "Add --gen_kwargs num_beams=1."
        )
    is_sampled = options.get("do_sample", True)
    return AnswerSettings(
        max_new_tokens=options.get("max_new_tokens") or MAX_NEW_TOKENS,
        temperature=(options.get("temperature") or 0.0) if is_sampled else 0.0,
        top_p=options.get("top_p") or 1.0,
        top_k=options.get("top_k") or 0,
    )


def stop_texts(options: dict[str, Any]) -> list[str]:
    """The texts at which a task wants answers cut.

    An empty line is none of them: tasks name it for models without turns, and ours would lose whole answers by it.
    """
    until = options.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text and text != "\n\n"]


def cut_answer(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of the texts."""
    for text in until:
        answer = answer.split(text)[0]
    return answer


def clean_question(question: str) -> str:
    """A question without places for pictures."""
    for placeholder in PICTURE_PLACEHOLDERS:
        question = question.replace(placeholder, "")
    return question.strip()


def to_pictures(visuals: Sequence[Any] | None, task: str) -> tuple[Image.Image, ...]:
    """RGB pictures of a task's document.

    Raises:
        BadInputError: video or sound.
    """
    from PIL import Image

    from ...blip3o_core.images import to_rgb

    for visual in visuals or ():
        if not isinstance(visual, Image.Image):
            raise BadInputError(
                f'Task "{task}" shows something other than pictures ({type(visual).__name__}).\n'
                "BLIP3-o looks at pictures only: leave the task out of --tasks."
            )
    return tuple(to_rgb(visual) for visual in visuals or ())


def answer_loss(
    pipeline: Blip3oPipeline,
    question: str,
    answer: str,
    pictures: Sequence[Image.Image] = (),
    *,
    system_prompt: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[float, bool]:
    """Mean negative log-probability of a token of an answer and of its end, and whether it is the likeliest answer.

    Raises:
        BadInputError: an empty answer.
    """
    from ...blip3o_core.language.answers import (
        AnswerSettings,
        Turn,
        choice_log_probabilities,
        continue_rows,
        encode_chat,
    )
    from ...blip3o_core.language.prompts import SYSTEM_PROMPT
    from ...blip3o_core.language.rows import pixel_limits

    backbone, tokenizer = pipeline.backbone, pipeline.tokenizer
    limits = pixel_limits(pipeline.files.folder, min_pixels, max_pixels)
    system_prompt = SYSTEM_PROMPT if system_prompt is None else system_prompt
    row = encode_chat(backbone, tokenizer, [Turn("user", question, tuple(pictures))], limits, system_prompt)
    total = choice_log_probabilities(backbone, tokenizer, row, [answer], device=pipeline.device)[0].item()
    token_ids = tokenizer.encode(answer)
    # One token more than the answer has, so that its end counts as well.
    settings = AnswerSettings(max_new_tokens=len(token_ids) + 1)
    likeliest = continue_rows(backbone, tokenizer, [row], device=pipeline.device, settings=settings)[0]
    return -total / (len(token_ids) + 1), likeliest == token_ids


def _load(folder: str, device: str, dtype: str) -> Blip3oPipeline:
    from ...blip3o_core.pipeline import load_pipeline

    if not folder:
        raise BadInputError("No checkpoint is named.\nAdd --model_args pretrained=FOLDER.")
    return load_pipeline(folder, device=process_device(device), dtype=dtype).load("backbone")


def _batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _import_lmms_eval() -> Any:
    try:
        from lmms_eval.api import model
    except ImportError as error:
        raise MissingFilesError(
            f'lmms-eval cannot be imported ({error}).\nInstall it with "pip install lmms-eval" and start again.'
        ) from error
    return model
