"""The rules that look at many rows: each finds what it is for, and lets the rest pass."""

import random

import pytest

from app.rules import RULES
from app.rules._base import seen
from app.rules.label_noise import LabelNoise
from app.rules.languages import Languages, language
from app.rules.near_duplicates import NearDuplicates
from app.rules.secrets import find, mask

WORDS = [f"word{n}" for n in range(3000)]


def run(rule, rows, task="generation"):
    said = []
    made = rule(lambda line, finding: said.append((line, finding)), task)
    for line, (text, label) in enumerate(rows, 1):
        made.see(seen(line, {"text": text, "label": label}, [("text", text)], text, label or ""))
    made.finish()
    return said


def test_the_folder_is_the_registry():
    assert [rule.__name__ for rule in RULES] == ["LabelNoise", "Languages", "NearDuplicates", "Secrets"]


def test_near_duplicates_are_found_at_every_distance_and_strangers_are_not():
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=120)) for _ in range(400)]
    for changed in (1, 2, 3):
        for n in range(20):
            words = texts[n + 20 * changed].split()
            for _ in range(changed):
                words[draw.randrange(120)] = "other"
            texts.append(" ".join(words))
    found = {line for line, _ in run(NearDuplicates, [(text, None) for text in texts])}
    assert not [line for line in found if line <= 400]
    assert len([line for line in found if 400 < line <= 420]) == 20  # one word of 120: 95 % alike
    assert len(found) >= 55
    assert not run(NearDuplicates, [(texts[0], None), (texts[0], None)])  # the report itself tells of rows that are the same
    assert run(NearDuplicates, [(texts[0], None), (texts[0].upper(), None)])[0][0] == 2


def test_wrong_labels_are_named_and_right_ones_are_not():
    draw = random.Random(1)
    topics = {"card": ["card", "declined", "payment", "bank", "visa"], "ship": ["parcel", "delivery", "courier", "late", "tracking"]}
    rows, wrong = [], set()
    for line in range(1, 401):
        topic = draw.choice(list(topics))
        words = draw.choices(topics[topic], k=4) + draw.choices(
            ["the", "my", "is", "not", "was", "and", "please", "help", "with", "today"], k=8
        )
        draw.shuffle(words)
        label = topic
        if line % 50 == 7:
            label = "ship" if topic == "card" else "card"
            wrong.add(line)
        rows.append((" ".join(words), label))
    assert {line for line, _ in run(LabelNoise, rows, "classification")} == wrong
    shuffled = [(text, draw.choice(["card", "ship"])) for text, _ in rows]
    assert not run(LabelNoise, shuffled, "classification")  # where words say nothing, nobody is accused
    assert not run(LabelNoise, rows, "generation")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The ship is in the harbour and it was not on time for the morning", "English"),
        ("Das Schiff ist nicht im Hafen und die Ladung ist auf dem Kai für den Kunden", "German"),
        ("Le bateau est dans le port et la cargaison est sur les quais pour vous", "French"),
        ("Корабль стоит в порту и ждёт", "Russian or another Cyrillic language"),
        ("船は港にいます。荷物はまだ届いていません。", "Japanese"),
        ("def f(x): return x", None),
    ],
)
def test_languages_are_told_apart(text, wanted):
    assert language(text) == wanted


def test_the_odd_language_is_named_and_a_mixture_is_told_once():
    english = ("The ship is in the harbour and it was not on time for the morning", None)
    german = ("Das Schiff ist nicht im Hafen und die Ladung ist auf dem Kai für den Kunden", None)
    assert [line for line, _ in run(Languages, [english] * 9 + [german])] == [10]
    mixed = run(Languages, [english, german] * 5)
    assert [finding.rule for _, finding in mixed] == ["mixed_languages"]
    assert not run(Languages, [english] * 5)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mail jo.doe@firma.de", ["an e-mail address"]),
        ("mail jo@example.com", []),
        ("call +49 170 1234567 or 555-123-4567", ["a phone number", "a phone number"]),
        ("card 4111 1111 1111 1111", ["a card number"]),
        ("card 4111 1111 1111 1112", []),
        ("AKIAIOSFODNN7EXAMPLE", ["an AWS key"]),
        ("ghp_0123456789abcdefghijklmnopqrstuvwxyz", ["an API key"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["a private key"]),
        ("password: hunter2hunter", ["a password"]),
        ("password: <your password>", []),
        ("In 2024 we sold 1234567 units, 10.5 % more", []),
        ("version 1.2.3.4 of 2026-01-02", []),
    ],
)
def test_secrets_and_personal_data(text, names):
    assert [name for _, name, _, _ in find(text)] == names
    assert not find(mask(text))
