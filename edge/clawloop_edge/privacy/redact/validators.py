"""Check digits and number rules: what makes a run of digits a card or an identity number, and not just digits.

Pure arithmetic on the digits of a candidate (separators already taken out); each rule names where it is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date

Check = Callable[[str], bool]

# Verhoeff's tables (J. Verhoeff, Error Detecting Decimal Codes, 1969): the dihedral group D5 and its permutations.
_D5 = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 2, 3, 4, 0, 6, 7, 8, 9, 5),
    (2, 3, 4, 0, 1, 7, 8, 9, 5, 6),
    (3, 4, 0, 1, 2, 8, 9, 5, 6, 7),
    (4, 0, 1, 2, 3, 9, 5, 6, 7, 8),
    (5, 9, 8, 7, 6, 0, 4, 3, 2, 1),
    (6, 5, 9, 8, 7, 1, 0, 4, 3, 2),
    (7, 6, 5, 9, 8, 2, 1, 0, 4, 3),
    (8, 7, 6, 5, 9, 3, 2, 1, 0, 4),
    (9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
)
_PERMUTED = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 5, 7, 6, 2, 8, 3, 0, 9, 4),
    (5, 8, 0, 3, 7, 9, 6, 1, 4, 2),
    (8, 9, 1, 6, 0, 4, 3, 5, 2, 7),
    (9, 4, 5, 3, 1, 2, 6, 8, 7, 0),
    (4, 2, 8, 6, 5, 7, 3, 9, 0, 1),
    (2, 7, 9, 3, 8, 0, 6, 4, 1, 5),
    (7, 0, 4, 6, 9, 1, 3, 2, 5, 8),
)

# Lengths of the SWIFT IBAN registry.
IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15),
    **dict.fromkeys(("BE",), 16),
    **dict.fromkeys(("DK", "FI", "FK", "FO", "GL", "NL", "SD"), 18),
    **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"), 20),
    **dict.fromkeys(("CH", "HR", "LI", "LV"), 21),
    **dict.fromkeys(("BG", "BH", "CR", "DE", "GB", "GE", "IE", "ME", "RS", "VA"), 22),
    **dict.fromkeys(("AE", "GI", "IL", "IQ", "TL", "OM", "SO"), 23),
    **dict.fromkeys(("AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG"), 24),
    **dict.fromkeys(("LY", "PT", "ST"), 25),
    **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("BI", "DJ", "FR", "GR", "IT", "MC", "MR", "SM"), 27),
    **dict.fromkeys(("AL", "AZ", "BY", "CY", "DO", "GT", "HU", "LB", "NI", "PL", "SV"), 28),
    **dict.fromkeys(("BR", "EG", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU", "YE"), 30),
    **dict.fromkeys(("MT", "SC"), 31),
    **dict.fromkeys(("LC",), 32),
    **dict.fromkeys(("RU",), 33),
}


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B."""
    total = 0
    for at, digit in enumerate(reversed(digits)):
        value = int(digit)
        if at % 2:
            value = value * 2 - 9 if value > 4 else value * 2
        total += value
    return total % 10 == 0


def verhoeff(digits: str) -> bool:
    """Verhoeff's check digit, as Aadhaar numbers have it."""
    check = 0
    for at, digit in enumerate(reversed(digits)):
        check = _D5[check][_PERMUTED[at % 8][int(digit)]]
    return check == 0


def weighted(digits: str, weights: Sequence[int]) -> int:
    """The sum of the first digits, each times its weight."""
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def iban(value: str) -> bool:
    """ISO 13616: a known country's length, and 1 modulo 97 with the first four characters moved to the end."""
    if IBAN_LENGTHS.get(value[:2]) != len(value):
        return False
    return int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1


def card(digits: str) -> bool:
    """A payment card: a number range that a network issues (ISO/IEC 7812), that network's length, and Luhn."""
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    two, four, length = int(digits[:2]), int(digits[:4]), len(digits)
    issued = (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or ((four == 6011 or two == 65 or 644 <= int(digits[:3]) <= 649) and length in (16, 19))
        or (3528 <= four <= 3589 and length in (16, 17, 18, 19))
        or ((two in (36, 38, 39) or 300 <= int(digits[:3]) <= 305) and length in (14, 16))
        or (two == 62 and length in (16, 17, 18, 19))
        or (two in (50, 56, 57, 58, 63, 67) and length in (13, 15, 16, 18, 19))
    )
    return issued and luhn(digits)


def ssn(digits: str) -> bool:
    """US social security number: no area 000 or 666, no group 00, no serial 0000 (SSA, 2011); area 9xx is an ITIN."""
    return (
        len(digits) == 9
        and digits[:3] not in ("000", "666")
        and digits[3:5] != "00"
        and digits[5:] != "0000"
        and (digits[0] != "9" or 50 <= int(digits[3:5]) <= 99)
    )


def nhs(digits: str) -> bool:
    """UK NHS number: modulo 11 with weights 10 to 2 (NHS Data Dictionary)."""
    if len(digits) != 10 or len(set(digits)) == 1:
        return False
    check = 11 - weighted(digits, range(10, 1, -1)) % 11
    return check % 11 == int(digits[9]) and check != 10


def spanish_id(value: str) -> bool:
    """Spanish DNI and NIE: the letter at the number's rest modulo 23."""
    number = value[:-1].translate(str.maketrans("XYZ", "012"))
    return number.isdigit() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == value[-1]


def italian_tax_code(value: str) -> bool:
    """Codice fiscale: characters at odd places by a table, at even places by themselves, modulo 26 (DM 23.12.1976)."""
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    total = 0
    for at, character in enumerate(value[:15]):
        place = int(character) if character.isdigit() else ord(character) - 65
        total += place if at % 2 else odd[place]
    return chr(65 + total % 26) == value[15]


def french_nir(digits: str) -> bool:
    """French social security number: 97 less the rest of the first 13 digits modulo 97 (INSEE)."""
    return len(digits) == 15 and 97 - int(digits[:13]) % 97 == int(digits[13:])


def german_tax_id(digits: str) -> bool:
    """German Steuer-ID: ISO 7064 modulo 11,10; one digit of the first ten comes two or three times."""
    if len(digits) != 11 or digits[0] == "0" or not 8 <= len(set(digits[:10])) <= 9:
        return False
    product = 10
    for digit in digits[:10]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def dutch_bsn(digits: str) -> bool:
    """Dutch BSN: the eleven test, the last digit with weight -1."""
    return len(digits) == 9 and digits != "0" * 9 and weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def belgian_nrn(digits: str) -> bool:
    """Belgian national number: 97 less the first nine digits modulo 97, with a 2 before them for births from 2000."""
    if len(digits) != 11:
        return False
    return any(97 - int(lead + digits[:9]) % 97 == int(digits[9:]) for lead in ("", "2"))


def pesel(digits: str) -> bool:
    """Polish PESEL: weights 1, 3, 7, 9 modulo 10; the month carries the century."""
    return (
        len(digits) == 11
        and 1 <= int(digits[2:4]) % 20 <= 12
        and 1 <= int(digits[4:6]) <= 31
        and weighted(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0
    )


def brazilian_cpf(digits: str) -> bool:
    """Brazilian CPF: two check digits modulo 11."""
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    first = weighted(digits[:9], range(10, 1, -1)) * 10 % 11 % 10
    second = weighted(digits[:10], range(11, 1, -1)) * 10 % 11 % 10
    return digits[9:] == f"{first}{second}"


def chinese_id(value: str) -> bool:
    """Resident identity card of China: GB 11643-1999, ISO 7064 modulo 11,2, and a birth date within."""
    rest = weighted(value[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11
    return "10X98765432"[rest] == value[17].upper() and is_date(value[6:10], value[10:12], value[12:14])


def korean_rrn(digits: str) -> bool:
    """Korean resident number: a birth date and a century digit; numbers since 2020 have no check digit."""
    if len(digits) != 13 or digits[6] not in "12345678":
        return False
    return is_date(("19" if digits[6] in "1256" else "20") + digits[:2], digits[2:4], digits[4:6])


def chilean_rut(value: str) -> bool:
    """Chilean RUT: weights 2 to 7 from the right, modulo 11."""
    total = sum(int(digit) * (2 + at % 6) for at, digit in enumerate(reversed(value[:-1])))
    return "0123456789K0"[11 - total % 11] == value[-1].upper()


def swiss_ahv(digits: str) -> bool:
    """Swiss AHV number: begins with 756, EAN-13's check digit."""
    if len(digits) != 13 or not digits.startswith("756"):
        return False
    return (10 - weighted(digits[:12], (1, 3) * 6) % 10) % 10 == int(digits[12])


def turkish_id(digits: str) -> bool:
    """Turkish TC number: two check digits from sums of odd and even places."""
    if len(digits) != 11 or digits[0] == "0":
        return False
    numbers = [int(digit) for digit in digits]
    tenth = (sum(numbers[0:9:2]) * 7 - sum(numbers[1:8:2])) % 10
    return tenth == numbers[9] and sum(numbers[:10]) % 10 == numbers[10]


def singapore_nric(value: str) -> bool:
    """Singapore NRIC and FIN: weights 2, 7, 6, 5, 4, 3, 2 modulo 11, a letter row for each series."""
    total = weighted(value[1:8], (2, 7, 6, 5, 4, 3, 2)) + (4 if value[0] in "TG" else 3 if value[0] == "M" else 0)
    rows = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "XWUTRQPNJLK"}
    return rows[value[0]][total % 11] == value[8]


def finnish_hetu(value: str) -> bool:
    """Finnish personal identity code: the nine digits modulo 31 name the last character."""
    return "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(value[:6] + value[-4:-1]) % 31] == value[-1]


def swedish_personal_number(digits: str) -> bool:
    """Swedish personnummer: Luhn over the last ten digits, which begin with a birth date (day + 60: coordination)."""
    short = digits[-10:]
    return len(digits) in (10, 12) and day_and_month(str(int(short[4:6]) % 60).zfill(2), short[2:4]) and luhn(short)


def danish_cpr(digits: str) -> bool:
    """Danish CPR: a birth date in front; its check digit was given up in 2007."""
    return len(digits) == 10 and day_and_month(digits[:2], digits[2:4])


def norwegian_id(digits: str) -> bool:
    """Norwegian fødselsnummer: two check digits modulo 11."""
    if len(digits) != 11:
        return False
    first = weighted(digits, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1)) % 11
    second = weighted(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11
    return first == 0 and second == 0


def south_african_id(digits: str) -> bool:
    """South African identity number: a birth date, then Luhn."""
    return len(digits) == 13 and day_and_month(digits[4:6], digits[2:4]) and digits[10] in "012" and luhn(digits)


def mexican_curp(value: str) -> bool:
    """Mexican CURP: a base-37 weighted sum names the last digit (RENAPO)."""
    letters = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    total = sum(letters.index(character) * (18 - at) for at, character in enumerate(value[:17]))
    return str((10 - total % 10) % 10) == value[17]


def vin(value: str) -> bool:
    """Vehicle identification number with the check digit of 49 CFR 565.15."""
    values = {**{str(d): d for d in range(10)}, **dict(zip("ABCDEFGH", range(1, 9), strict=True))}
    values |= dict(zip("JKLMNPRSTUVWXYZ", (1, 2, 3, 4, 5, 7, 9, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
    total = sum(values[c] * w for c, w in zip(value, (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2), strict=True))
    return "0123456789X"[total % 11] == value[8]


def tax_file_number(digits: str) -> bool:
    """Australian TFN: weighted sum divisible by 11."""
    return len(digits) == 9 and weighted(digits, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


def routing_number(digits: str) -> bool:
    """US bank routing number: weights 3, 7, 1 modulo 10 (American Bankers Association)."""
    return len(digits) == 9 and digits != "0" * 9 and weighted(digits, (3, 7, 1) * 3) % 10 == 0


def day_and_month(day: str, month: str) -> bool:
    """Whether both can stand in a date."""
    return 1 <= int(day) <= 31 and 1 <= int(month) <= 12


def is_date(year: str, month: str, day: str) -> bool:
    """A day that was, from 1900 on."""
    try:
        return date(int(year), int(month), int(day)).year >= 1900
    except ValueError:
        return False
