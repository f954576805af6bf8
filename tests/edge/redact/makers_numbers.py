"""Makers of personal data: numbers with their check digits, names, addresses, dates.

Apart from validators.py on purpose: what makes a number and what checks it shall not share a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .corpus import Maker, Rng

NAMES = (
    "jana", "björn", "amira", "lukas", "chiara", "dmitri", "elif", "henry", "inês", "mateo", "katrin", "kenji", "lwazi",
)  # fmt: skip
SURNAMES = (
    "Novak", "Bergmann", "Haddad", "Fischer", "Romano", "Walker", "Almeida", "Dubois", "Eriksen", "Gupta", "Hoffmann",
    "Jansen", "Kowalski", "Lindqvist", "Murphy", "Virtanen", "Yilmaz", "Popescu", "Novotny", "Sato", "Dlamini",
)  # fmt: skip
IBANS = (
    ("DE", 18), ("FR", 23), ("ES", 20), ("CH", 17), ("PL", 24), ("SE", 20), ("AT", 16), ("BE", 12), ("NO", 11),
    ("TR", 22), ("AE", 19), ("GR", 23), ("DK", 14), ("FI", 14), ("LU", 16), ("CZ", 20), ("HU", 24), ("PT", 21),
    ("GB", 14), ("IT", 22),
)  # fmt: skip


def plain(text: str) -> str:
    return text.translate(str.maketrans("öê", "oe"))


def weighed(digits: str, weights: Sequence[int]) -> int:
    return sum(int(d) * w for d, w in zip(digits, weights, strict=False))


def with_luhn(body: str) -> str:
    doubled = [int(d) * (2 if at % 2 == 0 else 1) for at, d in enumerate(reversed(body))]
    return body + str(-sum(v - 9 if v > 9 else v for v in doubled) % 10)


def grouped(digits: str, sizes: Sequence[int], mark: str) -> str:
    parts = []
    for size in sizes:
        parts.append(digits[:size])
        digits = digits[size:]
    return mark.join(parts)


def day(rng: Rng) -> tuple[str, str, str]:
    return f"{rng.randint(1, 28):02}", f"{rng.randint(1, 12):02}", str(rng.randint(1945, 1999))


def mail(rng: Rng) -> str:
    name, surname = plain(rng.choice(NAMES)), rng.choice(SURNAMES).lower()
    local = rng.choice(
        (f"{name}.{surname}", f"{name[0]}{surname}", f"{surname}{rng.of('digits', 2)}", f"{name}+{surname}")
    )
    host = rng.choice(
        (f"mail.{surname}.eu", f"{surname}.se", "protonmail.ch", "uni-jena.de", f"{name}.works", f"{surname}.com.br")
    )
    return f"{local}@{host}"


def iban(rng: Rng) -> str:
    country, length = rng.choice(IBANS)
    body = {"GB": "NWBK", "IT": "X"}.get(country, "") + rng.of("digits", length)
    rest = int("".join(str(int(c, 36)) for c in f"{body}{country}00")) % 97
    compact = f"{country}{98 - rest:02}{body}"
    return rng.choice((compact, " ".join(compact[at : at + 4] for at in range(0, len(compact), 4))))


def card(rng: Rng) -> str:
    prefix, length = rng.choice(
        (("4", 16), ("51", 16), ("2221", 16), ("3530", 16), ("36", 14), ("6759", 16), ("62", 16))
    )
    number = with_luhn(prefix + rng.of("digits", length - len(prefix) - 1))
    return grouped(number, (4, 6, 4), " ") if length == 14 else grouped(number, (4, 4, 4, 4), rng.choice(" -"))


def amex(rng: Rng) -> str:
    return grouped(with_luhn(rng.choice(("34", "37")) + rng.of("digits", 12)), (4, 6, 5), rng.choice((" ", "")))


def cpf(rng: Rng) -> str:
    digits = [rng.randint(0, 9) for _ in range(9)]
    for _ in range(2):
        digits.append(sum(d * w for d, w in zip(digits, range(len(digits) + 1, 1, -1), strict=True)) * 10 % 11 % 10)
    text = "".join(map(str, digits))
    return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"


def aadhaar(rng: Rng) -> str:
    """By the definition of the dihedral group, not by a table of it."""

    def product(a: int, b: int) -> int:
        turned = (a % 5 + (b % 5 if a < 5 else -b % 5)) % 5
        return turned + (5 if (a < 5) != (b < 5) else 0)

    def permuted(times: int, digit: int) -> int:
        for _ in range(times % 8):
            digit = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[digit]
        return digit

    body = rng.choice("23456789") + rng.of("digits", 10)
    total = 0
    for at, digit in enumerate(reversed(body + "0")):
        total = product(total, permuted(at, int(digit)))
    return grouped(body + str(next(d for d in range(10) if product(total, d) == 0)), (4, 4, 4), " ")


def pesel(rng: Rng) -> str:
    born, month, year = day(rng)
    body = f"{year[2:]}{month}{born}{rng.of('digits', 4)}"
    return body + str(-weighed(body, (1, 3, 7, 9) * 3) % 10)


def personnummer(rng: Rng) -> str:
    born, month, year = day(rng)
    digits = with_luhn(f"{year[2:]}{month}{born}{rng.of('digits', 3)}")
    return f"{digits[:6]}-{digits[6:]}"


def codice(rng: Rng) -> str:
    born = f"{rng.randint(50, 99)}{rng.choice('ABCDEHLMPRST')}{rng.randint(1, 28):02}"
    body = f"{rng.of('BCDFGLMNPRST', 6)}{born}H{rng.of('digits', 3)}"
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    places = [int(c) if c.isdigit() else ord(c) - 65 for c in body]
    return body + chr(65 + sum(place if at % 2 else odd[place] for at, place in enumerate(places)) % 26)


def nir(rng: Rng) -> str:
    _, month, year = day(rng)
    body = f"{rng.choice('12')}{year[2:]}{month}{rng.randint(1, 95):02}{rng.of('digits', 6)}"
    check = f"{97 - int(body) % 97:02}"
    return rng.choice((body + check, f"{grouped(body, (1, 2, 2, 2, 3, 3), ' ')} {check}"))


def rut(rng: Rng) -> str:
    number = rng.randint(5_000_000, 25_000_000)
    total = sum(int(d) * (2 + at % 6) for at, d in enumerate(reversed(str(number))))
    return f"{number:,}".replace(",", ".") + "-" + "0123456789K0"[11 - total % 11]


def nhs(rng: Rng) -> str:
    while True:
        body = rng.of("digits", 9)
        check = -weighed(body, range(10, 1, -1)) % 11
        if check != 10:
            return grouped(f"{body}{check}", (3, 3, 4), " ")


def bsn(rng: Rng) -> str:
    while True:
        digits = rng.of("digits", 9)
        if int(digits) and weighed(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0:
            return digits


def nric(rng: Rng) -> str:
    digits = rng.of("digits", 7)
    return f"S{digits}{'JZIHGFEDCBA'[weighed(digits, (2, 7, 6, 5, 4, 3, 2)) % 11]}"


def dni(rng: Rng) -> str:
    number = rng.randint(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def nie(rng: Rng) -> str:
    number = rng.randint(0, 9_999_999)
    return f"X{number:07}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def hetu(rng: Rng) -> str:
    born, month, year = day(rng)
    date, serial = f"{born}{month}{year[2:]}", f"{rng.randint(2, 899):03}"
    return f"{date}-{serial}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(date + serial) % 31]}"


def norwegian(rng: Rng) -> str:
    while True:
        born, month, year = day(rng)
        body = f"{born}{month}{year[2:]}{rng.randint(100, 499)}"
        first = -weighed(body, (3, 7, 6, 1, 8, 9, 4, 5, 2)) % 11
        second = -weighed(f"{body}{first}", (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
        if first < 10 and second < 10:
            return f"{body[:6]} {body[6:]}{first}{second}"


def belgian(rng: Rng) -> str:
    born, month, year = day(rng)
    body = f"{year[2:]}{month}{born}{rng.of('digits', 3)}"
    return f"{body[:2]}.{body[2:4]}.{body[4:6]}-{body[6:]}.{97 - int(body) % 97:02}"


def ahv(rng: Rng) -> str:
    body = "756" + rng.of("digits", 9)
    return grouped(body + str(-weighed(body, (1, 3) * 6) % 10), (3, 4, 4, 2), ".")


def german_tax(rng: Rng) -> str:
    while True:
        body = str(rng.randint(1, 9)) + rng.of("digits", 9)
        if len(set(body)) != 9:
            continue
        product = 10
        for digit in body:
            product = 2 * ((int(digit) + product) % 10 or 10) % 11
        return grouped(f"{body}{(11 - product) % 10}", (2, 3, 3, 3), " ")


def turkish(rng: Rng) -> str:
    body = str(rng.randint(1, 9)) + rng.of("digits", 8)
    numbers = [int(d) for d in body]
    tenth = (7 * sum(numbers[::2]) - sum(numbers[1::2])) % 10
    return f"{body}{tenth}{(sum(numbers) + tenth) % 10}"


def chinese(rng: Rng) -> str:
    born, month, year = day(rng)
    body = f"{rng.choice(('110101', '310104', '440305'))}{year}{month}{born}{rng.of('digits', 3)}"
    return body + "10X98765432"[weighed(body, [2 ** (17 - at) % 11 for at in range(17)]) % 11]


def curp(rng: Rng) -> str:
    born, month, year = day(rng)
    name = f"{rng.of('ABCDEFGHIJKLMNOPQRSTUVWXYZ', 1)}{rng.choice('AEIOU')}{rng.of('BCDFGLMNPR', 2)}"
    body = f"{name}{year[2:]}{month}{born}{rng.choice('HM')}DF{rng.of('BCDFGLMNPR', 3)}0"
    order = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    return body + str(-sum(order.index(c) * (18 - at) for at, c in enumerate(body)) % 10)


def dated(rng: Rng, form: str) -> str:
    """A number that begins with a birth date: `form` has `d`, `m`, `y` for it and `#` for digits."""
    born, month, year = day(rng)
    text = form.replace("d", born).replace("m", month).replace("y", year[2:])
    return "".join(rng.of("digits", 1) if c == "#" else c for c in text)


def address(rng: Rng) -> str:
    name, digits = rng.choice(SURNAMES), rng.of("digits", 5)
    number = rng.randint(1, 300)
    return rng.choice(
        (
            f"{number} {name} Court, Flat {rng.randint(1, 30)}, London SW{rng.randint(1, 9)} {rng.randint(1, 9)}AA",
            f"{number} W {name} Blvd Apt {rng.randint(1, 40)}, Chicago, IL {digits}",
            f"{number} {name} {rng.choice(('Street', 'Ave', 'Road', 'Lane'))}, Portland, OR {digits}",
            f"{number} {name} Crescent, Calgary, AB T2P {rng.randint(1, 9)}J{rng.randint(1, 9)}",
            f"{number} rue {name}, {digits} Lyon",
            f"Via {name} {number}, {digits} Milano",
            f"Avenida {name} {number}, {digits} Valencia",
            f"Rua {name} {number}, 4000-{digits[:3]} Porto",
            f"ul. {name} {number}/{rng.randint(1, 40)}, 00-{digits[:3]} Warszawa",
            f"{name}straat {number}, {rng.randint(1000, 9999)} AB Utrecht",
            f"{name}gatan {number}, {rng.randint(100, 999)} {digits[:2]} Stockholm",
            f"{rng.choice(('Haupt', 'Garten', 'Bahnhof'))}straße {number}, {digits} Köln",
            f"{name}weg {number}, {digits} Hamburg",
            f"P.O. Box {rng.randint(100, 9999)}",
        )
    )


def birthday(rng: Rng) -> str:
    born, month, year = day(rng)
    spoken = (
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "October",
        "November",
        "December",
    )
    name = rng.choice(spoken)
    numeric = (f"{born}.{month}.{year}", f"{year}/{month}/{born}", f"{year}-{month}-{born}", f"{month}/{born}/{year}")
    written = (f"{name} {int(born)}, {year}", f"{int(born)} {name[:3]} {year}", f"{int(born)}. {int(month)}. {year}")
    return rng.choice(numeric + written)


def angles(rng: Rng) -> str:
    def angle(most: int, sides: str) -> str:
        return f"{rng.randint(1, most)}°{rng.randint(0, 59)}'{rng.uniform(0, 59):.1f}\"{rng.choice(sides)}"

    return f"{angle(80, 'NS')} {angle(170, 'EW')}"


def mac(rng: Rng) -> str:
    cisco = ".".join(f"{rng.of('123456789abcdef', 2)}{rng.of('abcdef', 1)}{rng.of('digits', 1)}" for _ in range(3))
    return rng.choice((cisco, ":".join(rng.of("23456789ABCDEF", 2) for _ in range(6))))


NUMBERS: Mapping[str, Maker] = {
    **{
        maker.__name__: maker for maker in (mail, iban, card, amex, cpf, aadhaar, pesel, personnummer, codice, nir, rut)
    },
    **{
        maker.__name__: maker
        for maker in (nhs, bsn, nric, dni, nie, hetu, norwegian, belgian, ahv, german_tax, turkish)
    },
    **{maker.__name__: maker for maker in (chinese, curp, birthday, angles, mac)},
    "email": mail,
    "address": address,
    "somewhere": address,
    "home": address,
    "born": birthday,
    "discover": lambda rng: grouped(with_luhn("6011" + rng.of("digits", 11)), (4, 4, 4, 4), rng.choice(" -")),
    "ssn": lambda rng: f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}",
    "nino": lambda rng: (
        f"{rng.choice(('AB', 'CE', 'JK'))} {grouped(rng.of('digits', 6), (2, 2, 2), ' ')} {rng.choice('ABCD')}"
    ),
    "cpr": lambda rng: dated(rng, "dmy-####"),
    "korean": lambda rng: dated(rng, "ymd-1######"),
    "south_african": lambda rng: with_luhn(dated(rng, "ymd####08")),
    "sin": lambda rng: grouped(with_luhn(rng.choice("1245") + rng.of("digits", 7)), (3, 3, 3), " "),
    "imei": lambda rng: with_luhn("35" + rng.of("digits", 12)),
    "user": lambda rng: plain(rng.choice(NAMES))[0] + rng.choice(SURNAMES).lower(),
    "written_mail": lambda rng: f"{plain(rng.choice(NAMES))} [at] {rng.choice(SURNAMES).lower()} [dot] com",
}
