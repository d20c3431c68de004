"""The rules that look at many rows: each finds what it is for, and lets the rest pass."""

import random

import pytest

from app.datasets import edits
from app.datasets.rules import RULES
from app.datasets.rules._base import seen
from app.datasets.rules.label_noise import LabelNoise
from app.datasets.rules.labels import Labels
from app.datasets.rules.languages import Languages, language
from app.datasets.rules.near_duplicates import NearDuplicates
from app.datasets.rules.secrets import find, mask
from app.formats import FORMATS
from app.settings import PROJECT

WORDS = [f"word{n}" for n in range(3000)]


def run(rule, rows, task="generation"):
    said = []
    made = rule(lambda line, finding: said.append((line, finding)), FORMATS["classification" if task == "classification" else "chat"], {})
    for line, (text, label) in enumerate(rows, 1):
        row = text if isinstance(text, dict) else {"text": text, **({"label": label} if label else {})}
        made.see(seen(line, row))
    made.finish()
    return said


def test_the_folder_is_the_registry():
    names = [rule.__name__ for rule in RULES]
    files = sorted(path.stem for path in (PROJECT / "app" / "datasets" / "rules").glob("[!_]*.py"))
    assert [rule.__module__.rpartition(".")[2] for rule in RULES] == files
    assert {"ControlCharacters", "Duplicates", "FewRows", "LabelNoise", "Labels", "Languages", "NearDuplicates", "Ratings"} <= set(names)


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


def talk(asked, answer, system=""):
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


SYSTEM = " ".join(WORDS[:400])
CONTEXT = " ".join(WORDS[500:3000])
HONEST = {
    "the same system prompt": [talk(f"What is {n} + {n}?", f"It is {2 * n}.", SYSTEM) for n in range(9)],
    "the same context, another question": [
        talk(f"{CONTEXT}\n\nWhat does part {n} tell of the {WORDS[n]} and the {WORDS[n + 9]}?", "It tells nothing at all of this.")
        for n in range(9)
    ],
    "the question first": [talk(f"Does {WORDS[n]} {WORDS[n + 30]} stand here?\n\n{CONTEXT}", "Yes.") for n in range(9)],
    "another answer": [
        talk("Tell me something of your own choice about wood and about glue.", " ".join(WORDS[9 * n : 9 * n + 9])) for n in range(9)
    ],
    "another label": [{"text": " ".join(WORDS[:40]), "label": "a"}, {"text": " ".join(WORDS[:40]).upper(), "label": "b"}],
    "a difference far behind": [{"text": f"{CONTEXT} {' '.join(WORDS[1000 * n : 1000 * n + 900])}"} for n in range(3)],
}


@pytest.mark.parametrize("rows", HONEST.values(), ids=HONEST)
def test_honest_rows_are_not_called_near_duplicates(rows):
    assert not run(NearDuplicates, [(row, None) for row in rows])


def test_nearly_the_same_prompt_and_answer_are_a_near_duplicate():
    asked, answer = " ".join(WORDS[:100]), " ".join(WORDS[200:300])
    rows = [talk(asked, answer, SYSTEM), talk(asked.replace("word50 ", "other "), answer.replace("word250 ", "other "), "Be brief.")]
    assert [line for line, _ in run(NearDuplicates, [(row, None) for row in rows])] == [2]
    assert not run(NearDuplicates, [(rows[0], None), (talk(asked, " ".join(WORDS[300:400]), SYSTEM), None)])


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
        ("Statek jest w porcie, ale nie może wyjść, bo są na nim skrzypce, które czy to dla nas, czy przez pomyłkę", "Polish"),
        ("Skeppet är i hamnen och det har inte kommit till oss som vi trodde att det skulle", "Swedish"),
        ("Skibet er ikke i havnen, og jeg har også et brev som kan være fra kaptajnen", "Danish or Norwegian"),
        ("Gemi limanda değil ama bir mektup var ve bu mektup bizim için çok önemli, daha sonra gibi", "Turkish"),
        ("Con tàu không ở trong cảng và đây là một lá thư của thuyền trưởng với những người khác", "Vietnamese"),
        ("Het schip is niet in de haven en het is ook maar een brief van de kapitein", "Dutch"),
        ("Loď je v přístavu, ale není tam nikdo, který by se na ni také podíval, protože jsou to housle", "Czech or Slovak"),
        ("Laiva ei ole satamassa, mutta se on kirje joka oli myös hän ja kuin että", "Finnish"),
        ("A hajó nincs a kikötőben, és ez nem egy levél, hogy csak már az legyen, meg kell nézni", "Hungarian"),
        ("Nava nu este în port și o scrisoare care este pentru căpitan din oraș sau mai departe", "Romanian"),
        ("Kapal itu tidak ada dalam pelabuhan dan surat ini untuk kapten yang akan datang dari kota", "Indonesian or Malay"),
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
    translated = [(talk("The ship is in the harbour and it was not on time", german[0]), None)] * 8
    spoken = [(talk(german[0], german[0]), None)] * 2
    assert not run(Languages, translated + spoken)  # what is learnt is German throughout


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mail jo.doe@firma.de or see https://x.com/?to=jürgen.müller@firma.de", ["an e-mail address"] * 2),
        ("mail jo@example.com, noreply@firma.de", []),
        ("git@github.com:owner/repo.git, react@18.2.0, foo@1.2.3-rc.ab, logo@2x.png, @app.route", []),
        ("call +49 170 1234567 or 555-123-4567", ["a phone number", "a phone number"]),
        ("(555) 010-1234, +1.800.555.1234, 0170 1234567, 06 12 34 56 78, +34 612 345 678", ["a phone number"] * 5),
        ("Tel.: 089/1234567", ["a phone number"]),
        ("x = +1 234 5678 90; -10 +20 300 4000 50; +52.520008 +13.404954; up +12 500 000; 100-200-3000", []),
        ("card 4111 1111 1111 1111", ["a card number"]),
        ("card 4111 1111 1111 1112, EAN 4006381333931, at 1700000000000, 0 1 0 1 0 0 0 1 1 0 1 0 1 0", []),
        ("GB82 WEST 1234 5698 7654 32 and DE89370400440532013000", ["a bank account"] * 2),
        ("DE89370400440532013001, AB12 CDEF GHIJ KLMN 1234567", []),
        ("SSN 123-45-6789", ["a social security number"]),
        ("AKIAIOSFODNN7EXAMPLE", ["an AWS key"]),
        ("ghp_0123456789abcdefghijklmnopqrstuvwxyz", ["an API key"]),
        ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", ["an API key"]),
        ("a sk-based-approach-of-something-long, sk-learn, risk-assessment-and-management-of-things", []),
        ("x-api-key: 8f14e45fceea167a5a36dedd4bea2543", ["a key or token"]),
        ("Authorization: Bearer abcdefghijklmnopqrstuvwxyz123456", ["a key or token"]),
        ("hash = 8f14e45fceea167a5a36dedd4bea2543, api_key = YOUR_API_KEY_1234567, token: str = Field(None)", []),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq4Zs1Yx9\n-----END RSA PRIVATE KEY-----", ["a private key"]),
        ("Look for the line -----BEGIN RSA PRIVATE KEY----- in it.", []),
        ("password: hunter2hunter", ["a password"]),
        ('{"db_password": "Tr0ub4dor&3"}', ["a password"]),
        ("postgres://bob:s3cr3tpw@db.firma.de/x", ["a password"]),
        ("https://user:password@firma.de", []),
        ("password: <your password>, password: required, password: sha256, Password: must have 8 characters", []),
        ('password = request.form.get("password2"); password=user.password2; password = make2(1)', []),
        ("In 2024 we sold 1234567 units, 10.5 % more", []),
        ("version 1.2.3.4 of 2026-01-02 10:11:12.123456, 2.6.32-573.el6, 978-3-16-148410-0", []),
        ("uuid 550e8400-e29b-41d4-a716-446655440000, md5 d41d8cd98f00b204e9800998ecf8427e, 3.14159265358979323846", []),
    ],
)
def test_secrets_and_personal_data(text, names):
    assert [name for _, name, _, _ in sorted(find(text), key=lambda place: place[2])] == names
    assert not find(mask(text))
    if not names:
        assert mask(text) == text


def test_a_mask_covers_the_value_alone_and_a_key_as_a_whole():
    assert mask("DB_PASSWORD=Tr0ub4dor&3 # old") == "DB_PASSWORD=[password] # old"
    assert mask("-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq4Zs1Yx9\nMIIEpAIB\n-----END PRIVATE KEY-----!") == "[private key]!"
    assert mask("from postgres://bob:s3cr3tpw@db/x to jo.doe@firma.de") == "from postgres://bob:[password]@db/x to [e-mail address]"


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a <|im_end|> b", "a  b"),
        ("<s>[INST] hi [/INST] hello</s>", " hi  hello"),
        ("<｜User｜>hi<end_of_turn><eos>", "hi"),
        ("the price is <s>10</s> 8", "the price is <s>10</s> 8"),
        ("x <|> y, a <| f |> b, list[i], <sos>", "x <|> y, a <| f |> b, list[i], <sos>"),
    ],
)
def test_template_markers_are_told_from_code_and_html(text, stripped):
    assert edits.TEXT_EDITS["strip_markers"](text) == stripped
    assert bool(list(edits.markers(text))) == (text != stripped)


def test_control_characters_go_with_the_colours_they_bring():
    assert edits.TEXT_EDITS["strip_control"]("\x1b[1;31mred\x1b[0m\ufeff \x85\u202etxt") == "red txt"
    assert not edits.CONTROL.search("tab\t, line\r\n, é, 👩\u200d🔬, שלום\u200f")


def test_labels_are_looked_at_where_they_are():
    labels = ["billing"] * 3 + ["Billing", "delivery", "delivery", "biling", "other"]
    said = dict(run(Labels, [(f"text {n}", label) for n, label in enumerate(labels)], "classification"))
    assert {line: found.rule for line, found in said.items()} == {4: "label_variants", 7: "rare_label", 8: "rare_label"}
    assert said[4].fix["arguments"] == {"from": ["Billing"], "into": "billing"}
    assert "Did you mean “billing”?" in said[7].message and said[7].fix["label"] == "Change to “billing”"
    assert said[8].fix is None and "Did you mean" not in said[8].message
    (only,) = run(Labels, [("a", "x"), ("b", "x")], "classification")
    assert (only[0], only[1].rule) == (None, "one_class")
