from pathlib import Path

import pytest

from clawloop_server.config import HubSettings, ReleaseSettings, ServerConfig, load_config, save_config
from clawloop_shared.errors import ConfigError


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    config = load_config(tmp_path / "config.toml")
    assert config == ServerConfig()
    assert config.hub.host == "127.0.0.1", "nothing is open to the network unless the operator says so"
    assert config.release.auto


def test_what_is_saved_is_loaded_and_defaults_are_not_frozen_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = ServerConfig(
        hub=HubSettings(port=9000, names=("box", "10.0.0.5")), release=ReleaseSettings(expires_days=2)
    )
    save_config(path, config)
    assert load_config(path) == config
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert "expires_days = 2" in text
    assert "[train]" not in text
    assert "auto" not in text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[hubb]\n", "hubb"),
        ("[hub]\nadmin_prot = 1\n", "admin_prot"),
        ("[fleet]\nupload_evry_s = 1\n", "upload_evry_s"),
        ("[train]\nrankk = 1\n", "rankk"),
        ("[train.loss]\ntiscap = 1.0\n", "tiscap"),
        ("[gate]\nsample = 1\n", "sample"),
        ("[release]\nautomatic = true\n", "automatic"),
        ("[release]\nauto = 'yes'\n", "release.auto"),
        ("[train]\nrank = 0\n", "rank 0"),
        ("[train]\nalpha = 0.0\n", "alpha 0.0"),
        ("[train]\nbeta2 = 1.0\n", "beta2 1.0"),
        ("[train]\nadvantage = 'magic'\n", "advantage 'magic'"),
        ("[train]\nweight_decay = -0.1\n", "weight_decay -0.1"),
        ("[train.loss]\nkl_beta = -1.0\n", "kl_beta -1.0"),
        ("[hub]\nport = 99999\n", "99999"),
        ("[hub]\nport = 8441\n", "must differ"),
        ("[hub]\nhost = 'everywhere'\n", "everywhere"),
        ("[fleet]\nupload_every_s = -1.0\n", "-1.0"),
        ("[hub]\npublic_url = 'http://box'\n", "https://HOST"),
        ("[hub]\nadmin_port = -1\n", "admin_port -1"),
        ("[gate]\nsamples = 0\n", "samples 0"),
        ("[gate]\nz = -0.5\n", "z -0.5"),
        ("[release]\nexpires_days = 0.0\n", "expires_days 0.0"),
        ("not toml", "config.toml"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_address_in_invitations_is_the_public_one_and_the_certificate_has_every_name() -> None:
    plain = ServerConfig(hub=HubSettings(names=("gpu.example", "10.0.0.5"), port=9443))
    assert plain.url() == "https://gpu.example:9443"
    assert plain.url(port=1234) == "https://gpu.example:1234"
    assert plain.certificate_names == ["gpu.example", "10.0.0.5"]
    behind = ServerConfig(hub=HubSettings(public_url="https://learn.example/", names=("gpu.example",)))
    assert behind.url(port=1234) == "https://learn.example"
    assert behind.certificate_names == ["learn.example", "gpu.example"]
    assert ServerConfig(hub=HubSettings(names=("::1",), port=1)).url() == "https://[::1]:1"
