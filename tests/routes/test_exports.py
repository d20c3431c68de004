"""`/v1/exports` and the export tab of a model's page."""

from __future__ import annotations

import pytest

from app.kit import ids
from app.models import exports
from app.tables import Export


@pytest.mark.long
def test_an_export_through_the_api(api, session, user, tiny_registered) -> None:
    made = api.post("/v1/models/tiny/exports", json={"format": "gguf", "types": ["F16"]})
    assert made.status_code == 200, made.text
    key = made.json()["id"]
    assert made.json()["status"] == "queued" and api.get("/v1/exports").json()["data"][0]["id"] == key
    early = api.get(f"/v1/exports/{key}/files/tiny-F16.gguf")
    assert early.status_code == 409 and early.json()["error"]["code"] == "not_ready"
    exports.run(ids.parse(ids.EXPORT, key))
    found = api.get(f"/v1/exports/{key}").json()
    assert found["status"] == "succeeded" and found["error"] is None and found["parity"]["lines"][0]["kl"] < 1e-4
    file, card = found["files"]
    assert card["name"] == "README.md"
    whole = api.get(file["url"])
    assert whole.status_code == 200 and len(whole.content) == file["bytes"] and whole.content[:4] == b"GGUF"
    part = api.get(file["url"], headers={"range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole.content[100:200]
    assert part.headers["content-range"] == f"bytes 100-199/{file['bytes']}"
    assert api.get(file["url"], headers={"range": f"bytes={file['bytes'] + 1}-"}).status_code == 416
    assert api.get(f"/v1/exports/{key}/files/..%2f..%2fsecrets").status_code == 404
    assert api.get(f"/v1/exports/{key}/files/other.gguf").status_code == 404
    assert api.post(f"/v1/exports/{key}/cancel").json()["status"] == "succeeded"
    assert api.delete(f"/v1/exports/{key}").json() == {"id": key, "object": "export", "deleted": True}
    assert api.get(f"/v1/exports/{key}").status_code == 404 and api.get(file["url"]).status_code == 404


def test_refusals_have_a_reason_and_name_the_field(api, tiny_registered) -> None:
    for body, status, param in (
        ({"format": "exe"}, 400, "format"),
        ({"format": "gguf", "types": ["Q1"]}, 400, "types"),
        ({"format": "gguf", "kind": "x"}, 400, "kind"),
        ({}, 400, "format"),
    ):
        found = api.post("/v1/models/tiny/exports", json=body)
        assert found.status_code == status and found.json()["error"]["param"] == param, found.text
    assert api.post("/v1/models/nobody/exports", json={"format": "gguf"}).status_code == 404


def test_the_page_offers_shows_cancels_and_deletes(client, session, user, tiny_registered) -> None:
    page = f"/models/{ids.public(ids.MODEL, tiny_registered.id)}"
    text = client.get(f"{page}?tab=export").text
    assert "Export for other programs" in text and 'value="Q4_K_M"' in text
    sent = client.post(f"{page}/exports", data={"format": "gguf", "types": ["F16", "Q8_0"]}, follow_redirects=False)
    assert sent.status_code == 303
    (made,) = session.query(Export).all()
    assert made.spec["types"] == ["Q8_0", "F16"] and "every 2s" in client.get(f"{page}?tab=export").text
    key = ids.public(ids.EXPORT, made.id)
    client.post(f"/exports/{key}/cancel")
    session.refresh(made)
    assert made.status == "cancelled" and "every 2s" not in client.get(f"{page}?tab=export").text
    client.post(f"/exports/{key}/delete")
    assert key not in client.get(f"{page}?tab=export").text
    wrong = client.post(f"{page}/exports", data={"format": "gguf", "types": ["Q9"]})
    assert wrong.status_code == 400 and "has no type “Q9”" in wrong.text
