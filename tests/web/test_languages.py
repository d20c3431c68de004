"""The interface in other languages: catalogs that are whole, texts that are marked, and a language that is chosen."""

import re

import pytest
from babel.messages.pofile import read_po

from app import languages
from app.kit import humanize
from app.languages import FOLDER, LANGUAGES, LOCALES, SOURCE, gettext, ngettext
from tests.catalogs import ROOT, extracted, translated, unmarked

OTHERS = [language for language in LANGUAGES if language != SOURCE]
CODE = {
    "quiet danger", "danger quiet", "jobs stacked", "light dark", "two even", "drawing big", "drawing large", "Data", "Evaluation", "not applicable",
    "Prior baseline", "following instructions", "Esc", "Ctrl Enter", "Alt 1 … 9", "Backspace", "Python", "JavaScript", "Markdown", "The cat sat on",
}  # fmt: skip
NO_LANGUAGE = {
    *(f"{{{{ {text!r} }}}}" for text in CODE), "LUTHIER_", "UTC", "luthier", "broad", "curl", "?models=", 'placeholder="ftjob-…"', 'placeholder="smollm"',
    'placeholder="https:///"', 'aria-describedby="-help" aria-invalid="true"',
}  # fmt: skip
"""What templates hold that is no language: classes, keys, keyboard keys, commands and what is put in front of a model."""


PAGES = (
    "/", "/datasets", "/datasets/new", "/datasets/combine", "/models", "/models/hub", "/jobs", "/jobs/new", "/jobs/advice", "/compare", "/compare/new", "/searches",
    "/searches/new", "/evaluations", "/evals", "/graders", "/graders/new", "/distillations", "/playground", "/playground/prompts", "/playground/arena",
    "/playground/batch", "/playground/batches", "/playground/next-tokens", "/playground/tutorial", "/playground/vectors", "/playground/classify",
    "/learn", "/guide", "/guide/lora", "/settings", "/settings/account", "/settings/people", "/settings/projects", "/settings/webhooks", "/admin", "/admin/audit",
    "/admin/limits",
)  # fmt: skip


@pytest.fixture
def speaking():
    tokens = []
    yield lambda language: tokens.append(languages.current.set(language))
    for token in reversed(tokens):
        languages.current.reset(token)


@pytest.fixture(scope="module")
def messages():
    return {one.id: one for one in extracted() if one.id}


@pytest.mark.parametrize("language", OTHERS)
def test_a_catalog_has_every_message_and_no_other(language, messages):
    """`python -m tests.catalogs` writes them anew; then translate what it says is missing."""
    with (FOLDER / f"{language}.po").open("rb") as file:
        catalog = read_po(file, locale=LOCALES[language])
    there = {one.id: one for one in catalog if one.id}
    assert [said for said in messages if said not in there] == []
    assert [said for said in there if said not in messages] == []
    assert [said for said, one in there.items() if not translated(one) or one.fuzzy] == []


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_fills_in_what_its_message_does(language, messages):
    with (FOLDER / f"{language}.po").open("rb") as file:
        catalog = read_po(file, locale=LOCALES[language])
    wrong = []
    for one in catalog:
        forms = one.string if isinstance(one.string, tuple) else (one.string,)
        originals = one.id if isinstance(one.id, tuple) else (one.id,)
        for form in forms:
            named, known = re.findall(r"%\((\w+)\)s", form), re.findall(r"%\((\w+)\)s", " ".join(originals))
            whole = {"num"} | set(re.findall(r"%\((\w+)\)s", originals[-1]))
            if not set(named) <= set(known) or ((set(known) | {"num"}) != (set(named) | {"num"}) and set(named) | {"num"} != whole):
                wrong.append((one.id, form))
            if sorted(re.findall(r"</?[a-z]+", form)) != sorted(re.findall(r"</?[a-z]+", originals[-1])):
                wrong.append((one.id, form))
            if known and re.search(r"%(?![(%])", form.replace("%%", "")):
                wrong.append((one.id, form))
    assert wrong == []


def test_every_text_of_a_template_is_marked():
    found = [
        (path.name, text) for path in sorted((ROOT / "templates").rglob("*.html")) for text in unmarked(path) if text not in NO_LANGUAGE
    ]
    assert found == [], "put it into `{% trans %}` or `_()`"


def test_the_checker_sees_what_is_not_marked(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<p title="A title">Some text {{ _("marked") }} {% trans %}Whole{% endtrans %} <code>kept</code></p>{{ head("Runs") }}')
    assert unmarked(page) == ['title="A title"', "Some text", "{{ 'Runs' }}"]


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        ("", "", "en"), ("", "de", "de"), ("", "de-CH,en;q=0.5", "de"), ("", "fr,zh-CN;q=0.7,en;q=0.6", "zh"), ("", "zh-TW,zh-Hant;q=0.9", "en"),
        ("zh", "de", "zh"), ("xx", "de", "de"), ("", "de;q=0,en", "en"), ("", "de;q=2", "en"), ("", ",;,;q=,*", "en"), ("en", "de", "en"),
    ],
)  # fmt: skip
def test_which_language_a_person_reads(cookie, accepted, language):
    assert languages.chosen(cookie, accepted) == language


def test_a_page_is_in_the_language_that_was_chosen_and_the_api_stays_english(client, api):
    page = client.get("/jobs")
    assert '<html lang="en"' in page.text and ">Runs<" in page.text
    assert client.get("/jobs", headers={"accept-language": "de-AT"}).text.count("Läufe") > 1
    answer = client.post("/language", data={"language": "zh"}, headers={"referer": "http://testserver/jobs"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/jobs"
    page = client.get("/jobs", headers={"accept-language": "de"}).text
    assert '<html lang="zh"' in page and "训练任务" in page and 'id="words"' in page
    assert client.post("/language", data={"language": "tlh"}).status_code in (400, 422)
    refused = api.post("/v1/fine_tuning/jobs", json={"model": "none", "training_file": "file-0"}, headers={"accept-language": "de"})
    assert re.match(r"[ -~“”]+$", refused.json()["error"]["message"]), refused.text


def test_numbers_dates_and_plurals_follow_the_language(speaking):
    speaking("de")
    assert humanize.human_number(1204567) == "1.204.567" and humanize.human_number(0.25) == "0,25"
    assert humanize.human_bytes(1_360_000_000) == "1,36 GB" and humanize.human_percent(0.0184) == "1,8%"
    one, many = ngettext("%(num)s row", "%(num)s rows", 1), ngettext("%(num)s row", "%(num)s rows", 1204)
    assert one == "1 Zeile" and many == "1.204 Zeilen"
    speaking("zh")
    assert humanize.human_number(1204567) == "1,204,567"
    assert ngettext("%(num)s row", "%(num)s rows", 1) == ngettext("%(num)s row", "%(num)s rows", 2).replace("2", "1")
    with languages.english():
        assert gettext("Runs") == "Runs"
    assert gettext("Runs") != "Runs" and gettext("no message at all, 5%") == "no message at all, 5%"


@pytest.mark.parametrize("language", OTHERS)
def test_every_page_can_be_read_in_it(client, language):
    """No page fails in another language."""
    for path in PAGES:
        answer = client.get(path, headers={"accept-language": language})
        assert answer.status_code == 200, path
        assert f'<html lang="{language}"' in answer.text, path
