"""Sign-in with an OpenID Connect provider: a real small one on the loopback that signs with a key of its own, and what a false one tries."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode, urlsplit

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey
from sqlalchemy import select

from app.settings import get_settings
from app.tables import Identity, User
from app.web import oidc, people
from tests.conftest import csrf_token

SECRET = "between us"


class Provider:
    """Says yes to everybody who asks to sign in as `who`. `bend` may change the claims or the token that it gives out."""

    def __init__(self) -> None:
        self.key, self.codes = RSAKey.generate_key(2048, {"kid": "1", "use": "sig"}), {}
        self.who: dict[str, Any] = {"sub": "42", "preferred_username": "Ada", "email": "ada@example.org"}
        self.bend: Any = None
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                where = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(where.query).items()}
                if where.path == "/authorize":
                    self.send_response(302)
                    self.send_header("location", provider.authorize(query))
                    self.send_header("content-length", "0")
                    self.end_headers()
                else:
                    self.say(200, {"/.well-known/openid-configuration": provider.document, "/keys": provider.keys}[where.path]())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                form = {name: values[0] for name, values in parse_qs(body).items()}
                self.say(*provider.token(form, self.headers.get("authorization", "")))

            def say(self, status: int, found: dict[str, Any]) -> None:
                body = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def document(self) -> dict[str, Any]:
        return {"issuer": self.issuer, **{f"{name}_endpoint": f"{self.issuer}/{name.split('_')[0]}" for name in ("authorization", "token")},
                "authorization_endpoint": f"{self.issuer}/authorize", "jwks_uri": f"{self.issuer}/keys"}  # fmt: skip

    def keys(self) -> dict[str, Any]:
        return {"keys": [self.key.as_dict(private=False)]}

    def authorize(self, query: dict[str, str]) -> str:
        assert query["response_type"] == "code" and query["code_challenge_method"] == "S256" and "openid" in query["scope"]
        code = f"code-{len(self.codes)}"
        self.codes[code] = query
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def token(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        asked = self.codes.pop(form.get("code", ""), None)
        known = base64.b64encode(f"luthier:{quote_plus(SECRET)}".encode()).decode()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest()).rstrip(b"=").decode()
        if asked is None or asked["code_challenge"] != challenge or asked["redirect_uri"] != form["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        if authorization != f"Basic {known}":
            return 401, {"error": "invalid_client"}
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": "luthier", "iat": now, "exp": now + 300, "nonce": asked["nonce"], **self.who}
        signed = self.bend(self, claims) if self.bend else self.sign(claims)
        return 200, {"access_token": "x", "token_type": "Bearer", "id_token": signed}

    def sign(self, claims: dict[str, Any], key: Any = None) -> str:
        return jwt.encode({"alg": "RS256", "kid": "1"}, claims, key or self.key)


@pytest.fixture
def provider(monkeypatch, data_dir):
    made = Provider()
    monkeypatch.setattr(oidc, "_documents", {})
    for name, value in {"oidc_issuer": made.issuer, "oidc_client_secret": SECRET, "oidc_name": "Example ID"}.items():
        monkeypatch.setattr(get_settings(), name, value)
    yield made
    made.server.shutdown()


def there_and_back(browser: Any, path: str = "/oidc/begin?next=/jobs", method: str = "GET", **form: Any) -> Any:
    """The answer of the callback, after the provider was asked as a browser would."""
    left = browser.request(method, path, follow_redirects=False, **form)
    assert left.status_code == 303, left.text
    back = httpx.get(left.headers["location"], follow_redirects=False).headers["location"]
    return browser.get(back.replace("http://testserver", ""), follow_redirects=False)


def test_an_invitation_is_answered_by_an_identity_which_then_signs_in(session, user, web, provider):
    _, path = people.invite(session, user, "viewer", "Ada")
    session.commit()
    token = path.rsplit("/", 1)[1]
    assert "Use Example ID instead" in web.get(path).text and "Sign in with Example ID" in web.get("/sign-in").text
    assert there_and_back(web, f"/oidc/begin?invitation={token}").status_code == 303
    made = session.scalars(select(User).where(User.name == "Ada")).one()
    assert made.role == "viewer" and made.password_hash is None
    assert web.get("/jobs").status_code == 200
    web.cookies.clear()
    back = there_and_back(web)
    assert (back.status_code, back.headers["location"]) == (303, "/jobs") and web.get("/jobs").status_code == 200
    web.cookies.clear()
    people.disable(session, made)
    session.commit()
    assert there_and_back(web).status_code == 403, "a disabled account is not signed in to"


def test_a_stranger_is_not_let_in_whatever_address_he_claims(session, user, web, provider):
    provider.who |= {"preferred_username": user.name, "email": "owner@example.org", "email_verified": True}
    refused = there_and_back(web)
    assert refused.status_code == 403 and "Nobody here has this sign-in" in refused.text
    assert web.get("/jobs", follow_redirects=False).status_code == 303, "still signed out"


def test_an_identity_is_connected_by_its_person_and_disconnected_again(session, user, client, provider):
    page = client.get("/settings/account").text
    send = {"data": {"csrf_token": csrf_token(page)}}
    assert there_and_back(client, "/settings/account/identities", "POST", **send).headers["location"] == "/settings/account"
    mine = session.scalars(select(Identity)).one()
    assert (mine.user_id, mine.subject, mine.email) == (user.id, "42", "ada@example.org")
    assert "ada@example.org" in client.get("/settings/account").text
    other = User(name="other")
    session.add(other)
    session.commit()
    with pytest.raises(Exception, match="belongs to another account"):
        oidc.connect(session, other, oidc.Claims(provider.issuer, "42", "", ""))
    session.rollback()
    with pytest.raises(Exception, match="only way to sign in"):
        oidc.disconnect(session, user, mine.id)
    session.rollback()
    user.password_hash = "x"
    session.commit()
    assert client.post(f"/settings/account/identities/{mine.id}/remove", follow_redirects=False, **send).status_code == 303
    assert session.scalars(select(Identity)).all() == []


def unsigned(provider: Provider, claims: dict[str, Any]) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."


def shared_secret(provider: Provider, claims: dict[str, Any]) -> str:
    """The public key taken for a secret, as a careless verifier takes it."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "kid": "1"}, claims)]
    head = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    tag = hmac.digest(provider.key.as_pem(private=False), head.encode(), "sha256")
    return f"{head}.{base64.urlsafe_b64encode(tag).rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    "bend",
    [
        lambda p, c: p.sign(c | {"aud": "another program"}),
        lambda p, c: p.sign(c | {"iss": "https://evil.example"}),
        lambda p, c: p.sign(c | {"exp": c["iat"] - 600, "iat": c["iat"] - 900}),
        lambda p, c: p.sign(c | {"nonce": "old"}),
        lambda p, c: p.sign({k: v for k, v in c.items() if k != "nonce"}),
        lambda p, c: p.sign({k: v for k, v in c.items() if k != "exp"}),
        lambda p, c: p.sign(c, RSAKey.generate_key(2048, {"kid": "1"})),
        lambda p, c: p.sign(c)[:-4] + "AAAA",
        unsigned,
        shared_secret,
        lambda p, c: "",
    ],
    ids=[
        "audience",
        "issuer",
        "expired",
        "nonce",
        "no nonce",
        "no end",
        "another key",
        "bent",
        "no signature",
        "shared secret",
        "no token",
    ],
)
def test_a_token_that_is_not_right_in_everything_is_refused(session, user, client, web, provider, bend):
    oidc.connect(session, user, oidc.Claims(provider.issuer, "42", "", ""))
    session.commit()
    provider.bend = bend
    refused = there_and_back(web)
    assert refused.status_code == 403 and "sign-in was refused" in refused.text
    provider.bend = None
    assert there_and_back(web).status_code == 303, "and the honest one is let in"


def test_only_the_browser_that_began_may_end_and_only_once(session, user, web, provider):
    oidc.connect(session, user, oidc.Claims(provider.issuer, "42", "", ""))
    session.commit()
    left = web.get("/oidc/begin", follow_redirects=False)
    back = httpx.get(left.headers["location"], follow_redirects=False).headers["location"].replace("http://testserver", "")
    kept = dict(web.cookies)
    web.cookies.clear()
    assert "another browser" in web.get(back).text
    for name, value in kept.items():
        web.cookies.set(name, value)
    assert "state" in web.get(back.replace("state=", "state=x")).text
    assert web.get(back, follow_redirects=False).status_code == 303
    assert web.get(back, follow_redirects=False).status_code == 403, "a code is taken once"
    assert "access_denied" in web.get(f"/oidc/callback?error=access_denied&{back.partition('?')[2].partition('&')[2]}").text


def test_a_provider_that_calls_itself_otherwise_or_is_not_there_is_named(web, provider, monkeypatch):
    monkeypatch.setattr(provider, "issuer", "https://id.example.org")
    assert "calls itself" in web.get("/oidc/begin").text
    monkeypatch.setattr(get_settings(), "oidc_issuer", "http://id.example.org")
    assert "not https" in web.get("/oidc/begin").text
    monkeypatch.setattr(get_settings(), "oidc_issuer", "http://127.0.0.1:1")
    assert "cannot be reached" in web.get("/oidc/begin").text
    monkeypatch.setattr(get_settings(), "oidc_issuer", None)
    assert web.get("/oidc/begin").status_code == 404
