"""Answers through lmms-eval's interface, on a stand-in for its base class with the same attributes."""

import collections
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from comfyui_blip3o.pretraining.evaluation import lmms_eval_adapter as adapter
from PIL import Image
from tiny_models import picture, write_checkpoint

QUESTIONS = (
    "What is this",
    "How many red circle",
    "What color is the square ?",
    "Describe this",
    "yes or no ?",
)


class StandIn:
    """What lmms_eval.api.model.lmms gives its children."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}
        self.kept: list[tuple[str, Any, str]] = []
        self.cache_hook = self

    def add_partial(self, attribute: str, request: Any, answer: str) -> None:
        self.kept.append((attribute, request, answer))


@dataclass
class Request:
    args: tuple


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Blip3oPipeline:
    return load_pipeline(write_checkpoint(tmp_path_factory.mktemp("checkpoint")), device="cpu")


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    package, api, model = (ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"))
    model.lmms, api.model = StandIn, model
    for module in (package, api, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    adapter.model_class.cache_clear()
    yield
    adapter.model_class.cache_clear()


@pytest.fixture
def make(lmms_eval: None, pipeline: Blip3oPipeline) -> Callable[..., Any]:
    """A model whose task "shapes" shows picture n with question n; the last question shows none."""

    def make(**options: Any) -> Any:
        model = adapter.Blip3oModel(pipeline=pipeline, **options)
        docs = [
            {"question": question, "pictures": [picture(seed=n)] if n < 4 else [], "answer": f"red {n}"}
            for n, question in enumerate(QUESTIONS)
        ]
        model.task_dict = collections.defaultdict(dict, shapes={"test": docs})
        return model

    return make


def pictures_of(doc: dict[str, Any]) -> list[Image.Image]:
    return doc["pictures"]


def asks(options: list[dict[str, Any]]) -> list[Request]:
    return [
        Request((f"<image>\n{question}", each, pictures_of, n, "shapes", "test"))
        for n, (question, each) in enumerate(zip(QUESTIONS, options, strict=True))
    ]


def alone(pipeline: Blip3oPipeline, number: int, tokens: int) -> str:
    shown = [picture(seed=number)] if number < 4 else []
    settings = AnswerSettings(max_new_tokens=tokens)
    return pipeline.ask(QUESTIONS[number], [shown], settings=settings)[0]


@pytest.mark.parametrize("batch_size", [1, 2, "8"])
def test_answers_come_in_order_whatever_the_batches(
    make: Callable[..., Any], pipeline: Blip3oPipeline, batch_size: int | str
):
    model = make(batch_size=batch_size)
    lengths = [5, 9, 5, 9, 5]  # two kinds of options, mixed
    answers = model.generate_until(
        asks([{"max_new_tokens": tokens, "until": ["\n\n"]} for tokens in lengths])
    )
    assert answers == [alone(pipeline, n, tokens) for n, tokens in enumerate(lengths)]
    assert len(set(answers)) > 1  # the questions do matter
    assert sorted(kept[2] for kept in model.kept) == sorted(answers)


def test_an_answer_ends_where_the_task_says(make: Callable[..., Any], pipeline: Blip3oPipeline):
    whole = alone(pipeline, 1, 9)
    until = whole[len(whole) // 2]
    answers = make().generate_until(asks([{"max_new_tokens": 9, "until": until}] * 5))
    assert answers[1] == whole[: whole.index(until)] != whole


def test_sampling_follows_the_tasks_options(make: Callable[..., Any]):
    greedy = make().generate_until(asks([{"max_new_tokens": 8}] * 5))
    held = make().generate_until(asks([{"max_new_tokens": 8, "do_sample": False, "temperature": 5.0}] * 5))
    lively = make().generate_until(asks([{"max_new_tokens": 8, "do_sample": True, "temperature": 5.0}] * 5))
    assert greedy == held != lively


def test_options_as_tasks_write_them_become_ours():
    settings = adapter.answer_settings(
        {"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}
    )
    assert settings == AnswerSettings(max_new_tokens=16)
    assert adapter.answer_settings({}).max_new_tokens == adapter.MAX_NEW_TOKENS
    with pytest.raises(BadInputError, match="5 beams"):
        adapter.answer_settings({"num_beams": 5})


def test_the_likeliest_answer_has_the_smallest_loss_and_is_called_greedy(
    make: Callable[..., Any], pipeline: Blip3oPipeline
):
    model = make()
    choices = ("red", "blue circle", "two dogs", "A", "yes")
    requests = [Request((QUESTIONS[0], f" {c}", pictures_of, 0, "shapes", "test")) for c in choices]
    losses = [loss for loss, _ in model.loglikelihood(requests)]
    probabilities = pipeline.choose(QUESTIONS[0], choices, [picture(seed=0)])
    # choose() adds up over tokens; a mean times its tokens must order and differ the same way.
    tokens = [len(pipeline.tokenizer.encode(choice)) + 1 for choice in choices]
    totals = torch.tensor([-loss * count for loss, count in zip(losses, tokens, strict=True)])
    torch.testing.assert_close(
        totals.softmax(0), torch.tensor(list(probabilities.values())), atol=1e-5, rtol=1e-4
    )
    assert not any(is_greedy for _, is_greedy in model.loglikelihood(requests))


def test_an_answer_the_model_would_give_is_greedy(pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch):
    row = "What is this"
    monkeypatch.setattr(
        "comfyui_blip3o.blip3o_core.language.answers.continue_rows",
        lambda *_, **__: [pipeline.tokenizer.encode("red circle")],
    )
    assert adapter.answer_loss(pipeline, row, "red circle")[1]
    assert not adapter.answer_loss(pipeline, row, "red")[1]


def test_an_answer_may_be_a_function_of_the_document_or_stand_alone(make: Callable[..., Any]):
    model = make()
    by_name = model.loglikelihood([Request((QUESTIONS[2], "red 2", pictures_of, 2, "shapes", "test"))])
    by_function = model.loglikelihood(
        [Request((QUESTIONS[2], lambda doc: doc["answer"], pictures_of, 2, "shapes", "test"))]
    )
    assert by_name == by_function
    alone_loss, _ = model.loglikelihood([Request(("", "red 2"))])[0]
    assert alone_loss > 0 and alone_loss != by_name[0][0]


def test_what_cannot_be_scored_is_refused_by_the_tasks_name(make: Callable[..., Any]):
    model = make()
    model.task_dict["films"]["test"] = [{"pictures": ["film.mp4"]}]
    with pytest.raises(BadInputError, match="films.*not.*pictures|films.*other than pictures"):
        model.generate_until([Request(("What is this", {}, pictures_of, 0, "films", "test"))])
    with pytest.raises(BadInputError, match="several rounds"):
        model.generate_until_multi_round([])


def test_wrong_arguments_are_explained(lmms_eval: None):
    with pytest.raises(BadInputError, match="pretrained=FOLDER"):
        adapter.Blip3oModel()
    with pytest.raises(BadInputError, match="batch_size"):
        adapter.Blip3oModel("folder", batch_size="auto")


def test_the_class_is_loaded_from_a_folder_by_name(lmms_eval: None, pipeline: Blip3oPipeline):
    model = getattr(adapter, adapter.CLASS_NAME)(str(pipeline.files.folder), batch_size="4", device="cpu")
    assert issubclass(type(model), StandIn) and model.is_simple
    assert (model.batch_size, str(model.device)) == (4, "cpu")


def test_without_lmms_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    adapter.model_class.cache_clear()
    with pytest.raises(MissingFilesError, match="pip install lmms-eval"):
        adapter.Blip3oModel  # noqa: B018


def test_importing_the_adapter_imports_no_lmms_eval():
    source = Path(adapter.__file__).read_text("utf-8")
    assert "\nfrom lmms_eval" not in source and "\nimport lmms_eval" not in source
    with pytest.raises(AttributeError, match="nothing"):
        adapter.nothing  # noqa: B018
