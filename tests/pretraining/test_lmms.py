"""The lmms-eval adapter: every request answered in order, with its own settings, pictures and stops."""

from comfyui_blip3o.pretraining.lmms import answer_requests
from PIL import Image


class Echo:
    """Stands where a pipeline does: answers with what it was asked."""

    def __init__(self):
        self.calls = []

    def ask(self, questions, pictures, *, settings):
        self.calls.append((len(questions), settings.max_new_tokens, settings.temperature))
        return [
            f"{question} {len(images)} {images[0].mode}\n\nmore"
            for question, images in zip(questions, pictures, strict=True)
        ]


def request(number, **options):
    return (
        f"<image>\nquestion {number}",
        {"max_new_tokens": 16, "until": ["\n\n"], **options},
        lambda document: [Image.new("L", (4, 4))] * document["pictures"],
        number,
        "task",
        "test",
    )


def documents(task, split, number):
    assert (task, split) == ("task", "test")
    return {"pictures": 1 + number % 2}


def test_answers_keep_the_order_of_the_requests_across_batches_and_settings():
    echo = Echo()
    requests = [request(0), request(1, temperature=0.5), request(2), request(3, max_new_tokens=4)]
    answers = answer_requests(echo, requests, documents, batch_size=3)
    assert answers == [f"question {n} {1 + n % 2} RGB" for n in range(4)]
    assert sorted(echo.calls) == [(1, 4, 0.0), (1, 16, 0.5), (2, 16, 0.0)]
