"""`keys`: what people compare."""

from __future__ import annotations

import hashlib
import ssl

from clawloop_server.cli.common import HomeOption, JsonOption, home_of, print_facts, print_json


def keys(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The words of the root key, as devices show them on joining, and the names of the keys that it vouches for."""
    from clawloop_server.config import load_config
    from clawloop_server.fleet.tls import ensure_tls
    from clawloop_server.release.keys import load_keys
    from clawloop_shared.signing import key_id, key_words

    found = home_of(home)
    held = load_keys(found)
    tls = ensure_tls(found.keys, load_config(found.config).certificate_names)
    authority = ssl.PEM_cert_to_DER_cert(tls.ca.read_text())
    facts: dict[str, object] = {
        "words": key_words(held.root_public),
        "root_key": key_id(held.root_public),
        "release_key": key_id(held.release_public),
        "tls_authority_sha256": hashlib.sha256(authority).hexdigest(),
    }
    if as_json:
        print_json(facts)
        return
    print_facts("keys", {name.replace("_", " "): value for name, value in facts.items()})
