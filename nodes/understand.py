"""Nodes that look: ask, caption, chat, choose, rewrite a prompt, keep the best pictures."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..blip3o_core.errors import BadInputError
from ..blip3o_core.images import MAX_PIXELS, to_pil
from ..blip3o_core.language.prompts import CAPTION_STYLES, SYSTEM_PROMPT
from ..blip3o_core.seeds import MAX_SEED
from .native import host
from .native.answers import (
    answer_settings,
    ask_each,
    join_answers,
    parse_choices,
    question_turn,
    require_pictures,
)
from .native.sockets import BackboneHandle, BackboneType, Chat, ChatType

CATEGORY = "BLIP3-o/understand"
REWRITE_STYLES = {
    "richer": "Rewrite this picture description with more detail about subject, surroundings, light and style, in at most three "
    "sentences. Keep everything it says. Answer with the description only: {prompt}",
    "shorter": "Rewrite this picture description in one short sentence and keep what matters most. "
    "Answer with the description only: {prompt}",
    "clearer": "Rewrite this picture description in plain sentences that say what is where, how many and in which colour. "
    "Answer with the description only: {prompt}",
}
EXPLAIN_QUESTION = (
    "Does this picture show {statement}? Say in one short sentence what fits and what does not."
)


def backbone_input() -> io.Input:
    return BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o.")


def answer_inputs(max_new_tokens: int) -> list[io.Input]:
    return [
        io.Int.Input(
            "max_new_tokens",
            default=max_new_tokens,
            min=1,
            max=4096,
            tooltip="Longest answer; a token is about three quarters of a word.",
        ),
        io.Float.Input(
            "temperature",
            default=0.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="0 always gives the likeliest answer, 0.7 a lively one, above 1 a wild one.",
            advanced=True,
        ),
        io.Float.Input(
            "top_p",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="With temperature: keep the likeliest words that together have this probability. 0.9 is usual.",
            advanced=True,
        ),
        io.Int.Input(
            "top_k",
            default=0,
            min=0,
            max=1000,
            tooltip="With temperature: keep only this many of the likeliest words. 0 keeps all.",
            advanced=True,
        ),
        io.Float.Input(
            "repetition_penalty",
            default=1.0,
            min=0.5,
            max=2.0,
            step=0.01,
            tooltip="Above 1 avoids words that were used before. 1 is off, 1.05-1.1 is usual.",
            advanced=True,
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="With temperature: same seed, same answer. Answer number i uses seed + i.",
            advanced=True,
        ),
        io.Int.Input(
            "max_pixels",
            default=MAX_PIXELS,
            min=3136,
            max=12845056,
            step=784,
            tooltip="Larger pictures are shrunk to this many pixels before they are looked at. "
            "More shows finer detail and needs more time and memory.",
            advanced=True,
        ),
    ]


def system_prompt_input() -> io.Input:
    return io.String.Input(
        "system_prompt",
        default=SYSTEM_PROMPT,
        multiline=True,
        tooltip="Who the model is. The default is what it was trained with.",
        advanced=True,
    )


class Ask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oAsk",
            display_name="Ask About Images (BLIP3-o)",
            category=CATEGORY,
            description="Ask a question about pictures, or without any. The answers appear on the node and come out as a list, "
            "one per picture.",
            search_aliases=["blip3o", "vqa", "question", "vision language", "vlm", "describe"],
            inputs=[
                backbone_input(),
                io.String.Input(
                    "question",
                    multiline=True,
                    dynamic_prompts=True,
                    default="What is in this picture?",
                    tooltip="What you want to know, in plain words.",
                ),
                io.Combo.Input(
                    "batch",
                    options=["one answer per image", "one answer for all images"],
                    default="one answer per image",
                    tooltip="Whether each picture of a batch is asked about alone, or all of them together in one question.",
                ),
                *answer_inputs(128),
                system_prompt_input(),
                io.Image.Input("images", optional=True, tooltip="Pictures the question is about."),
            ],
            outputs=[
                io.String.Output("answers", tooltip="One answer per picture.", is_output_list=True),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        question: str,
        batch: str,
        system_prompt: str,
        max_pixels: int,
        images: Tensor | None = None,
        **sampling: Any,
    ) -> io.NodeOutput:
        if images is None:
            groups: list[list[Image.Image]] = [[]]
        elif batch == "one answer per image":
            groups = [[picture] for picture in require_pictures(images)]
        else:
            groups = [require_pictures(images)]
        answers = ask_each(
            backbone,
            [question_turn(question, group) for group in groups],
            settings=answer_settings(**sampling),
            system_prompt=system_prompt,
            max_pixels=max_pixels,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(answers, ui=ui.PreviewText(join_answers(answers)))


class Caption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oCaption",
            display_name="Caption Images (BLIP3-o)",
            category=CATEGORY,
            description="Describe each picture. The captions appear on the node and come out as a list, one per picture.",
            search_aliases=["blip3o", "caption", "describe", "tagger", "image to text", "interrogate"],
            inputs=[
                backbone_input(),
                io.Image.Input("images", tooltip="Pictures to describe."),
                io.Combo.Input(
                    "style",
                    options=list(CAPTION_STYLES),
                    default="short",
                    tooltip="short: one sentence. detailed: everything. tags: comma-separated words. "
                    "training: plain sentences for training a picture generator.",
                ),
                *answer_inputs(256),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="Your own instruction instead of the style",
                    tooltip="Replaces the style's instruction if not empty.",
                    advanced=True,
                ),
                io.String.Input(
                    "prefix",
                    default="",
                    optional=True,
                    tooltip="Text put before every caption, e.g. the trigger word of a LoRA.",
                ),
            ],
            outputs=[io.String.Output("captions", tooltip="One caption per picture.", is_output_list=True)],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        images: Tensor,
        style: str,
        max_pixels: int,
        instruction: str = "",
        prefix: str = "",
        **sampling: Any,
    ) -> io.NodeOutput:
        wording = instruction.strip() or CAPTION_STYLES[style]
        answers = ask_each(
            backbone,
            [question_turn(wording, [picture]) for picture in require_pictures(images)],
            settings=answer_settings(**sampling),
            system_prompt=SYSTEM_PROMPT,
            max_pixels=max_pixels,
            node_id=cls.hidden.unique_id,
        )
        captions = [f"{prefix.strip()} {answer}".strip() for answer in answers]
        return io.NodeOutput(captions, ui=ui.PreviewText(join_answers(captions)))


class ChatNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oChat",
            display_name="Chat (BLIP3-o)",
            category=CATEGORY,
            description="Say something, with pictures if you like, and get an answer. Connect chat to the next Chat node to go "
            "on talking about the same pictures.",
            search_aliases=["blip3o", "conversation", "dialog", "multi turn", "history"],
            inputs=[
                backbone_input(),
                io.String.Input(
                    "message",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What you say in this turn.",
                ),
                *answer_inputs(256),
                system_prompt_input(),
                io.Image.Input("images", optional=True, tooltip="Pictures shown with this message."),
                ChatType.Input(
                    "chat", optional=True, tooltip="What was said before, from another Chat node."
                ),
            ],
            outputs=[
                io.String.Output("answer", tooltip="The answer to this message."),
                ChatType.Output("chat", tooltip="The whole conversation, for the next Chat node."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        message: str,
        system_prompt: str,
        max_pixels: int,
        images: Tensor | None = None,
        chat: Chat | None = None,
        **sampling: Any,
    ) -> io.NodeOutput:
        from ..blip3o_core.language.answers import Turn

        if not message.strip():
            raise BadInputError("The message is empty.\nWrite what you want to say.")
        shown = () if images is None else tuple(images.unbind(0))
        asked = (chat or Chat()).with_turn("user", message.strip(), shown)
        pictures = iter([to_pil(image)[0] for image in asked.images])
        turns = [
            Turn(role, text, tuple(next(pictures) for _ in range(count))) for role, text, count in asked.turns
        ]
        answer = ask_each(
            backbone,
            [turns],
            settings=answer_settings(**sampling),
            system_prompt=system_prompt,
            max_pixels=max_pixels,
            node_id=cls.hidden.unique_id,
        )[0]
        return io.NodeOutput(answer, asked.with_turn("assistant", answer), ui=ui.PreviewText(answer))


class Choose(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oChoose",
            display_name="Choose (BLIP3-o)",
            category=CATEGORY,
            description="Let the model pick one of your answers, with a probability. Good for sorting pictures and for "
            "switching parts of a graph.",
            search_aliases=["blip3o", "classify", "yes no", "multiple choice", "score", "filter"],
            inputs=[
                backbone_input(),
                io.String.Input(
                    "question", multiline=True, default="", tooltip="What is to be decided, in plain words."
                ),
                io.String.Input(
                    "choices",
                    multiline=True,
                    default="yes\nno",
                    tooltip="One answer per line, or separated by commas. yes and no for a yes/no question.",
                ),
                io.Image.Input("images", optional=True, tooltip="Pictures; each is decided alone."),
            ],
            outputs=[
                io.String.Output(
                    "choice", tooltip="The likeliest answer, one per picture.", is_output_list=True
                ),
                io.Float.Output("probability", tooltip="Its probability, 0 to 1.", is_output_list=True),
                io.Boolean.Output(
                    "is_first", tooltip="Whether it is the first choice (yes).", is_output_list=True
                ),
                io.String.Output(
                    "all_probabilities",
                    tooltip="All choices with probabilities, as JSON.",
                    is_output_list=True,
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, backbone: BackboneHandle, question: str, choices: str, images: Tensor | None = None
    ) -> io.NodeOutput:
        options = parse_choices(choices)
        if not question.strip():
            raise BadInputError("The question is empty.\nWrite what is to be decided.")
        groups = [()] if images is None else [(picture,) for picture in require_pictures(images)]
        pipeline = backbone.pipeline
        progress = host.StepProgress(len(groups))
        results = []
        for group in groups:
            if [option.lower() for option in options] in (["yes", "no"], ["no", "yes"]):
                yes = pipeline.ask_yes_no(question.strip(), group)
                scores = {option: yes if option.lower() == "yes" else 1 - yes for option in options}
            else:
                scores = pipeline.choose(question.strip(), options, group)
            results.append(scores)
            progress(len(results))
        picked = [max(scores, key=scores.__getitem__) for scores in results]
        lines = [f"{choice} ({scores[choice]:.0%})" for choice, scores in zip(picked, results, strict=True)]
        return io.NodeOutput(
            picked,
            [scores[choice] for choice, scores in zip(picked, results, strict=True)],
            [choice == options[0] for choice in picked],
            [json.dumps({option: round(score, 6) for option, score in scores.items()}) for scores in results],
            ui=ui.PreviewText(join_answers(lines)),
        )


class RewritePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oRewritePrompt",
            display_name="Rewrite Prompt (BLIP3-o)",
            category=CATEGORY,
            description="Let the backbone put a prompt into better words. Connect the result to Encode Prompt.",
            search_aliases=["blip3o", "prompt enhancer", "upsampler", "expand prompt", "magic prompt"],
            inputs=[
                backbone_input(),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt to rewrite.",
                ),
                io.Combo.Input(
                    "style",
                    options=list(REWRITE_STYLES),
                    default="richer",
                    tooltip="richer adds detail, shorter keeps the essence, clearer says what is where.",
                ),
                *answer_inputs(160),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="Your own instruction, with {prompt} where the prompt goes",
                    tooltip="Replaces the style's instruction if not empty. {prompt} stands for the prompt.",
                    advanced=True,
                ),
            ],
            outputs=[io.String.Output("prompt", tooltip="The rewritten prompt.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        prompt: str,
        style: str,
        max_pixels: int,
        instruction: str = "",
        **sampling: Any,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise BadInputError("The prompt is empty.\nWrite what is to be rewritten.")
        wording = instruction.strip() or REWRITE_STYLES[style]
        if "{prompt}" not in wording:
            wording += ": {prompt}"
        rewritten = ask_each(
            backbone,
            [question_turn(wording.replace("{prompt}", prompt.strip()), [])],
            settings=answer_settings(**sampling),
            system_prompt=SYSTEM_PROMPT,
            max_pixels=max_pixels,
            node_id=cls.hidden.unique_id,
        )[0].strip('" \n')
        if not rewritten:
            raise BadInputError(
                "The model had nothing to say to this prompt.\n"
                "Try another style, your own instruction, or use the prompt as it is."
            )
        return io.NodeOutput(rewritten, ui=ui.PreviewText(rewritten))


class BestOf(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oBestOf",
            display_name="Best Of (BLIP3-o)",
            category=CATEGORY,
            description="Let the model look at its own pictures and keep those that show the prompt best. "
            "Connect a batch of pictures; connect best to Save Image.",
            search_aliases=["blip3o", "self check", "rank", "score", "filter", "judge", "best of n"],
            inputs=[
                backbone_input(),
                io.Image.Input("images", tooltip="The pictures to choose from."),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="What the pictures should show."
                ),
                io.Int.Input("keep", default=1, min=1, max=64, tooltip="How many pictures to keep."),
                io.Boolean.Input(
                    "explain",
                    default=False,
                    tooltip="Also say in a sentence what fits and what does not. Takes longer.",
                ),
            ],
            outputs=[
                io.Image.Output("best", tooltip="The best pictures, best first."),
                io.Float.Output(
                    "scores",
                    tooltip="Probability, 0 to 1, that each input picture shows the prompt.",
                    is_output_list=True,
                ),
                io.String.Output(
                    "reasons", tooltip="What the model says about each input picture.", is_output_list=True
                ),
                io.Int.Output(
                    "indices", tooltip="Which input pictures were kept, from 0.", is_output_list=True
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, backbone: BackboneHandle, images: Tensor, prompt: str, keep: int, explain: bool
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise BadInputError("The prompt is empty.\nWrite what the pictures should show.")
        pictures = require_pictures(images)
        statement = prompt.strip().rstrip(".")
        pipeline = backbone.pipeline
        progress = host.StepProgress(len(pictures))
        scores: list[float] = []
        for picture in pictures:
            scores += pipeline.score([picture], statement)
            progress(len(scores))
        reasons = [f"{score:.0%} sure" for score in scores]
        if explain:
            said = ask_each(
                backbone,
                [
                    question_turn(EXPLAIN_QUESTION.format(statement=statement), [picture])
                    for picture in pictures
                ],
                settings=answer_settings(64, 0.0, 1.0, 0, 1.0, 0),
                system_prompt=SYSTEM_PROMPT,
                max_pixels=MAX_PIXELS,
                node_id=cls.hidden.unique_id,
            )
            reasons = [f"{reason}: {text}" for reason, text in zip(reasons, said, strict=True)]
        order = torch.tensor(scores).argsort(descending=True, stable=True)[:keep].tolist()
        return io.NodeOutput(images[order], scores, reasons, order, ui=ui.PreviewText(join_answers(reasons)))


NODES = [Ask, Caption, ChatNode, Choose, RewritePrompt, BestOf]
