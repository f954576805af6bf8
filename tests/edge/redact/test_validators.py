"""Check digits, by examples that the issuers publish, and by what a changed digit does to them."""

import pytest

from clawloop_edge.privacy.redact import validators

from .corpus import Rng
from .makers_numbers import NUMBERS

PUBLISHED = [
    (validators.luhn, "79927398713"),
    (validators.card, "4111111111111111"),
    (validators.card, "378282246310005"),
    (validators.card, "6011111111111117"),
    (validators.iban, "DE89370400440532013000"),
    (validators.iban, "GB82WEST12345698765432"),
    (validators.iban, "NO9386011117947"),
    (validators.verhoeff, "2363"),
    (validators.nhs, "9434765919"),
    (validators.spanish_id, "12345678Z"),
    (validators.italian_tax_code, "RSSMRA85T10A562S"),
    (validators.french_nir, "255081416802538"),
    (validators.german_tax_id, "86095742719"),
    (validators.dutch_bsn, "111222333"),
    (validators.belgian_nrn, "85073003328"),
    (validators.pesel, "44051401359"),
    (validators.brazilian_cpf, "11144477735"),
    (validators.chinese_id, "11010519491231002X"),
    (validators.swiss_ahv, "7569217076985"),
    (validators.turkish_id, "10000000146"),
    (validators.singapore_nric, "S1234567D"),
    (validators.finnish_hetu, "131052308T"),
    (validators.swedish_personal_number, "8112189876"),
    (validators.south_african_id, "8001015009087"),
    (validators.vin, "1M8GDM9AXKP042788"),
    (validators.routing_number, "111000025"),
    (validators.chilean_rut, "125319092"),
    (validators.tax_file_number, "123456782"),
    (validators.mexican_curp, "HEGG560427MVZRRL04"),
]


@pytest.mark.parametrize(("check", "number"), PUBLISHED)
def test_published_numbers_hold(check: validators.Check, number: str) -> None:
    assert check(number)


@pytest.mark.parametrize(("check", "number"), PUBLISHED)
def test_most_numbers_with_a_changed_last_digit_do_not(check: validators.Check, number: str) -> None:
    others = [number[:-2] + f"{at}" + number[-1] for at in range(10) if f"{at}" != number[-2]]
    assert sum(map(check, others)) <= 2


MADE = {
    "iban": validators.iban,
    "card": validators.card,
    "amex": validators.card,
    "pesel": validators.pesel,
    "bsn": validators.dutch_bsn,
    "nhs": validators.nhs,
    "nir": validators.french_nir,
    "codice": validators.italian_tax_code,
    "turkish": validators.turkish_id,
    "imei": validators.luhn,
    "aadhaar": validators.verhoeff,
    "curp": validators.mexican_curp,
}


@pytest.mark.parametrize("name", MADE)
def test_makers_and_checks_agree_though_they_share_nothing(name: str) -> None:
    rng = Rng(7)
    assert all(MADE[name](NUMBERS[name](rng).replace(" ", "").replace("-", "")) for _ in range(200))


@pytest.mark.parametrize("number", ["000000000", "666123456", "123004567", "123450000", "900111111"])
def test_social_security_numbers_that_were_never_issued_are_none(number: str) -> None:
    assert not validators.ssn(number)
    assert validators.ssn("078051120")
