"""What is said about scenes is true, and held-out wordings stay held out."""

import numpy as np
from comfyui_blip3o.pretraining.evaluation.geneval import CATEGORIES, category_prompts
from comfyui_blip3o.pretraining.world.captions import (
    canonical_caption,
    caption_is_held_out,
    draw_caption,
    draw_questions,
    match_question,
    scene_objects,
)
from comfyui_blip3o.pretraining.world.scenes import RELATIONS, draw_scenes
from comfyui_blip3o.pretraining.world.vocabulary import WordIds, build_tokenizer

SCENES = draw_scenes(400, 31, held_out=None)


def questions_of(type_name):
    rng = np.random.default_rng(1)
    for n in range(len(SCENES)):
        for question in draw_questions(SCENES, n, rng):
            if question.type == type_name:
                yield n, question


def test_wordings_are_held_out_or_trained_but_never_both():
    rng = np.random.default_rng(0)
    trained = {draw_caption(SCENES, n, rng, held_out=False) for n in range(len(SCENES))}
    unseen = {draw_caption(SCENES, n, rng, held_out=True) for n in range(len(SCENES))}
    assert not any(caption_is_held_out(caption) for caption in trained)
    # A scene with few wordings may have none held out; then its full description stands in.
    assert np.mean([caption_is_held_out(caption) for caption in unseen]) > 0.9


def test_the_full_description_names_left_or_upper_object_first():
    for n in np.flatnonzero(SCENES.group == 1):
        words = canonical_caption(SCENES, int(n)).split()
        assert ("left" in words) != ("above" in words)
        first, second = scene_objects(SCENES, int(n))
        swapped = RELATIONS[SCENES.relation[n]] in ("right of", "below")
        named_first = second if swapped else first
        assert words[1:3] == [named_first[1], named_first[0]]


def test_counts_are_counted():
    numbers = ("zero", "one", "two", "three")
    checked = 0
    for n, question in questions_of("count"):
        words = question.text.rstrip("?").split()
        wanted = [
            word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words[2:-2]
        ]
        objects = [(kind, colour, "object") for kind, colour in scene_objects(SCENES, n)]
        assert question.answer == numbers[sum(all(word in thing for word in wanted) for thing in objects)]
        checked += 1
    assert checked == len(SCENES)


def test_existence_questions_are_answered_both_ways():
    answers = []
    for n, question in questions_of("exist"):
        words = question.text.rstrip("?").split()[2:]
        wanted = [word for word in words if word not in ("a", "an", "something")]
        found = any(all(word in thing for word in wanted) for thing in scene_objects(SCENES, n))
        assert question.answer == ("yes" if found else "no")
        answers.append(question.answer)
    assert 0.25 < np.mean([answer == "yes" for answer in answers]) < 0.75


def test_where_questions_follow_the_coordinates():
    for n, question in questions_of("where"):
        k = question.mentions[0][1]
        dx, dy = SCENES.x[n, k] - SCENES.x[n, 1 - k], SCENES.y[n, k] - SCENES.y[n, 1 - k]
        side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")
        assert question.answer == side


def test_match_questions_are_half_yes_and_mention_words_of_their_text():
    rng = np.random.default_rng(2)
    asked = [match_question(SCENES, n, rng) for n in range(len(SCENES))]
    assert 0.4 < np.mean([question.answer == "yes" for question in asked]) < 0.6
    for question in asked:
        assert all(word in question.text.replace("?", " ").split() for word, _ in question.mentions)


def test_every_category_has_sixty_different_unseen_prompts():
    for category in CATEGORIES:
        prompts = category_prompts(category, 60, seed=3)
        assert len({prompt.text for prompt in prompts}) == 60
        assert all(caption_is_held_out(prompt.text) for prompt in prompts)
        numbers = {len(prompt.request.things) for prompt in prompts}
        assert numbers == ({1} if category in ("single object", "counting", "colours") else {2})
        assert all((prompt.request.relation is not None) == (category == "position") for prompt in prompts)


def test_fast_word_ids_equal_the_tokenizer():
    vocabulary, tokenizer = WordIds(), build_tokenizer()
    rng = np.random.default_rng(3)
    for n in range(60):
        for text in (
            draw_caption(SCENES, n, rng),
            match_question(SCENES, n, rng).text,
            "<|im_start|>user\n[IMG]A Red circle, unheard-of<|im_end|>",
        ):
            assert vocabulary(text) == tokenizer.encode(text).ids


def test_captions_and_answers_hold_no_unknown_word():
    vocabulary = WordIds()
    rng = np.random.default_rng(4)
    for n in range(100):
        texts = [draw_caption(SCENES, n, rng), canonical_caption(SCENES, n)]
        texts += [
            part for question in draw_questions(SCENES, n, rng) for part in (question.text, question.answer)
        ]
        for text in texts:
            assert vocabulary.unknown not in vocabulary(text), text
