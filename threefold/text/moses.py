r"""The rules of the Moses tokenizer for English, as rules that a tokenizer.json can say; BioGPT was trained on them.

Moses (Koehn and others 2007) pads punctuation with spaces, keeps the full stop of an abbreviation, splits hyphens as
`@-@` and writes `&apos;` for an apostrophe; its counterpart puts the spaces back as people write them.

Decisions:
- Each rule is one replacement of a pattern by a fixed text. A rule of Moses that keeps what stands left of a sign is a
  pattern with `\K`, which leaves it out of what is replaced but not out of what was read, so that neighbours compete
  as they do there. Where a rule also reads on to the right, a mark is put behind what it has read, the sign in front of
  the mark is replaced, and the mark is taken out.
- A letter or digit is what the Perl lists that come with Moses say: no Han, no Hangul, nothing newer than Unicode 7. So
  every Korean syllable is a word. Once all other signs are padded, a character beside a quote is one of few.
- Which of two equal quotes opens is told by counting. That is done for the five signs that texts use: a longer run of
  quotes always opens here.
- Noncharacters serve as marks: no text is meant to hold them. In one that does, the mark of the first direction is
  changed to a sign as unknown as itself.
"""

from __future__ import annotations

from typing import Any

Rule = tuple[str, str]  # a regular expression, and what takes the place of each match

_ALNUM = """
    30-39 41-5a 61-7a aa b5 ba c0-d6 d8-f6 f8-2c1 2c6-2d1 2e0-2e4 2ec 2ee 345 370-374 376-377 37a-37d 37f 386 388-38a 38c
    38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 559 561-587 5b0-5bd 5bf 5c1-5c2 5c4-5c5 5c7 5d0-5ea 5f0-5f2 610-61a 620-657 659-669
    66e-6d3 6d5-6dc 6e1-6e8 6ed-6fc 6ff 710-73f 74d-7b1 7c0-7ea 7f4-7f5 7fa 800-817 81a-82c 840-858 8a0-8b2 8e4-8e9 8f0-950
    955-963 966-96f 971-983 985-98c 98f-990 993-9a8 9aa-9b0 9b2 9b6-9b9 9bc-9c4 9c7-9c8 9cb-9ce 9d7 9dc-9dd 9df-9e3 9e6-9f1
    a01-a03 a05-a0a a0f-a10 a13-a28 a2a-a30 a32-a33 a35-a36 a38-a39 a3c a3e-a42 a47-a48 a4b-a4d a51 a59-a5c a5e a66-a75 a81-a83
    a85-a8d a8f-a91 a93-aa8 aaa-ab0 ab2-ab3 ab5-ab9 abc-ac5 ac7-ac9 acb-acd ad0 ae0-ae3 ae6-aef afd-aff b01-b03 b05-b0c b0f-b10
    b13-b28 b2a-b30 b32-b33 b35-b39 b3c-b44 b47-b48 b4b-b4d b56-b57 b5c-b5d b5f-b63 b66-b6f b71 b82-b83 b85-b8a b8e-b90 b92-b95
    b99-b9a b9c b9e-b9f ba3-ba4 ba8-baa bae-bb9 bbe-bc2 bc6-bc8 bca-bcd bd0 bd7 be6-bef c00-c03 c05-c0c c0e-c10 c12-c28 c2a-c39
    c3d-c44 c46-c48 c4a-c4d c55-c56 c58-c59 c60-c63 c66-c6f c81-c83 c85-c8c c8e-c90 c92-ca8 caa-cb3 cb5-cb9 cbc-cc4 cc6-cc8 cca-
    ccd cd5-cd6 cde ce0-ce3 ce6-cef cf1-cf2 d01-d03 d05-d0c d0e-d10 d12-d44 d46-d48 d4a-d4e d57 d60-d63 d66-d6f d7a-d7f d82-d83
    d85-d96 d9a-db1 db3-dbb dbd dc0-dc6 dca dcf-dd4 dd6 dd8-ddf de6-def df2-df3 e01-e3a e40-e46 e4d e50-e59 e81-e82 e84 e87-e88
    e8a e8d e94-e97 e99-e9f ea1-ea3 ea5 ea7 eaa-eab ead-ebd ec0-ec4 ec6 ecd ed0-ed9 edc-edf f00 f20-f29 f40-f47 f49-f6c f71-f81
    f88-f97 f99-fbc 1000-1036 1038-1039 103b-1049 1050-1062 1065-1068 106e-1086 108e 1090-1099 109c-109d 10a0-10c5 10c7 10cd
    10d0-10fa 10fc-1248 124a-124d 1250-1256 1258 125a-125d 1260-1288 128a-128d 1290-12b0 12b2-12b5 12b8-12be 12c0 12c2-12c5
    12c8-12d6 12d8-1310 1312-1315 1318-135a 135f 1380-138f 13a0-13f4 1401-166c 166f-167f 1681-169a 16a0-16ea 16ee-16f8 1700-170c
    170e-1714 1720-1733 1740-1753 1760-176c 176e-1770 1772-1773 1780-17b3 17b6-17c8 17d7 17dc 17e0-17e9 1810-1819 1820-1877
    1880-18aa 18b0-18f5 1900-191e 1920-192b 1930-1938 1946-196d 1970-1974 1980-19ab 19b0-19c9 19d0-19d9 1a00-1a1b 1a20-1a5e
    1a61-1a74 1a80-1a89 1a90-1a99 1aa7 1b00-1b33 1b35-1b43 1b45-1b4b 1b50-1b59 1b80-1ba9 1bab-1be5 1be7-1bf1 1c00-1c35 1c37
    1c40-1c49 1c4d-1c7d 1ce9-1cec 1cee-1cf3 1cf5-1cf6 1d00-1dbf 1de7-1df4 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59
    1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2071 207f
    2090-209c 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2139 213c-213f 2145-2149 214e 2160-2188 24b6-24e9
    25cc 2c00-2c2e 2c30-2c5e 2c60-2ce4 2ceb-2cee 2cf2-2cf3 2d00-2d25 2d27 2d2d 2d30-2d67 2d6f 2d80-2d96 2da0-2da6 2da8-2dae
    2db0-2db6 2db8-2dbe 2dc0-2dc6 2dc8-2dce 2dd0-2dd6 2dd8-2dde 2de0-2dff 2e2f 3006 3031-3035 303c 3041-3096 309d-309f 30a1-30fa
    30fc-30ff 3105-312d 3131-318e 31a0-31ba 31f0-31ff a000-a48c a4d0-a4fd a500-a60c a610-a62b a640-a66e a674-a67b a67f-a69d
    a69f-a6ef a717-a71f a722-a788 a78b-a78e a790-a7ad a7b0-a7b1 a7f7-a801 a803-a805 a807-a80a a80c-a827 a840-a873 a880-a8c4
    a8d0-a8d9 a8f2-a8f7 a8fb a900-a92a a930-a953 a960-a97c a980-a9b2 a9b4-a9bf a9cf-a9d9 a9e0-a9e4 a9e6-a9fe aa00-aa36 aa40-aa4d
    aa50-aa59 aa60-aa76 aa7a aa7e-aabe aac0 aac2 aadb-aadd aae0-aaef aaf2-aaf6 ab01-ab06 ab09-ab0e ab11-ab16 ab20-ab26 ab28-ab2e
    ab30-ab5a ab5c-ab5f ab64-ab65 abc0-abea abf0-abf9 d7b0-d7c6 d7cb-d7fb fb00-fb06 fb13-fb17 fb1d-fb28 fb2a-fb36 fb38-fb3c fb3e
    fb40-fb41 fb43-fb44 fb46-fbb1 fbd3-fd3d fd50-fd8f fd92-fdc7 fdf0-fdfb fe70-fe74 fe76-fefc ff10-ff19 ff21-ff3a ff41-ff5a
    ff66-ffbe ffc2-ffc7 ffca-ffcf ffd2-ffd7 ffda-ffdc 10a3f 11046 110b9-110ba 11133 11173 111c0 111ca 11235-11236 112e9-112ea
    1133c 1134d 11442 11446 114c2-114c3 115bf-115c0 1163f 116b6-116b7 11839-1183a 119e0 11a34 11c3f 11d42 11d45 11d97 1e94a
"""
_DIGITS = """
    30-39 660-669 6f0-6f9 7c0-7c9 966-96f 9e6-9ef a66-a6f ae6-aef b66-b6f be6-bef c66-c6f ce6-cef d66-d6f de6-def e50-e59
    ed0-ed9 f20-f29 1040-1049 1090-1099 17e0-17e9 1810-1819 1946-194f 19d0-19d9 1a80-1a89 1a90-1a99 1b50-1b59 1bb0-1bb9
    1c40-1c49 1c50-1c59 a620-a629 a8d0-a8d9 a900-a909 a9d0-a9d9 a9f0-a9f9 aa50-aa59 abf0-abf9 ff10-ff19
"""
_NUMERALS = "16ee-16f0 2160-2182 2185-2188 a6e6-a6ef"  # letters that count as numbers beside a comma
_NOT_LOWER = """
    560 588 10d0-10fa 10fc-10ff 1c8a 2c5f a7af a7b9 a7bb a7bd a7bf a7c1 a7c3 a7c8 a7ca a7cd a7d1 a7d3 a7d5 a7d7 a7d9 a7db
    a7f2-a7f4 a7f6 ab66-ab69 10597-105a1 105a3-105b1 105b3-105b9 105bb-105bc 10780 10783-10785 10787-107b0 107b2-107ba
    10d70-10d85 16e60-16e7f 1df00-1df09 1df0b-1df1e 1df25-1df2a 1e030-1e06d
"""
_NOT_MONEY = "7fe-7ff 20be-20c0 11fdd-11fe0 1e2ff 1ecb0"
_CJK = "1100-11ff 2e80-a4cf a840-a87f ac00-d7af f900-faff fe30-fe4f ff65-ffdc 17000-18aff 1b000-1b12f 1b170-1b2ff 20000-2ffff"
# A full stop behind one of these belongs to the word; with `_WITH_NUMBERS` only in front of a number.
_ABBREVIATIONS = (
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z Adj Adm Adv Apr Asst Aug Bart Bldg Brig Bros Capt Cmdr Col Comdr "
    "Con Corp Cpl DR Dec Dr Drs Ens Feb Gen Gov Hon Hosp Hr Insp Jan Jul Jun Lt MM MR MRS MS Maj Mar Messrs Mlle Mme Mr "
    "Mrs Ms Msgr Nos Nov Nr Oct Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rs Rt Sen Sens Sep Sfc Sgt Sr St Supt Surg rev v vs"
)
_WITH_NUMBERS = "Art No pp"
_READ, _JOINED, _CLOSING, _NEVER = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd6"  # marks


def _ranges(written: str) -> str:
    """Code points in hexadecimal as the inside of a character class."""
    ends = [span.partition("-") for span in written.split()]
    return "".join([chr(int(a, 16)) + (f"-{chr(int(b, 16))}" if b else "") for a, _, b in ends])


_SIGNS = " .'`,-"  # what is not padded; all else that is no letter or digit stands alone between spaces
_DIGIT = _ranges(_DIGITS)
_NUMBER = _DIGIT + _ranges(_NUMERALS)
_WORD = r"[^ .'`,\-]"
_ALPHA, _NO_ALPHA = rf"[^ .'`,\-{_DIGIT}]", rf"[ .'`,\-{_DIGIT}]"
_STOP = "(?![^ ])"  # the end of a word


def _reading_on(left: str, right: str, content: str) -> list[Rule]:
    """An apostrophe between `left` and `right` becomes `content`, where `right` serves no second apostrophe."""
    return [(rf"{left}'{right}\K", _READ), (rf"'(?=[^{_READ}]{_READ})", content), (_READ, "")]


def _full_stop() -> Rule:
    keeps = "|".join(
        [
            rf"(?=[^ ]*\.[^ ]*\.{_STOP})[^ ]*{_ALPHA}",
            rf"(?:{_ABBREVIATIONS.replace(' ', '|')})\.{_STOP}",
            rf"(?:{_WITH_NUMBERS.replace(' ', '|')})\. +[0-9]",
        ]
    )
    lower = rf"(?! +[◌[\p{{Lower}}&&[^{_ranges(_NOT_LOWER)}]]])"
    ends = rf"(?=[^ ]*\.{_STOP})"  # looked at first, so that a long word with many points costs no more than its length
    return rf"(?<![^ ]){ends}(?!\.\.|{keeps})[^ ]+\K\.{_STOP}{lower}", " ."


# Text -> words between spaces.
SPLITTING: tuple[Rule, ...] = (
    (_READ, _NEVER),
    (r"[\t-\r\x1C-\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]+", " "),
    (r"[\x00-\x1F]", ""),
    (r"\A +| +\z", ""),
    (f"(?=[^{_ranges(_ALNUM)}{_SIGNS}])", " "),
    (rf"[^{_ranges(_ALNUM)}{_SIGNS}]\K", " "),
    (rf"{_WORD}\K-(?={_WORD})", " @-@ "),
    (r"(?<!\.)(?=\.\.)|(?<=\.\.)(?!\.)", " "),
    (rf"[^{_NUMBER}]\K,", " , "),
    (f",(?=[^{_NUMBER}])", " , "),
    (rf"[{_NUMBER}]\K,\z", " , "),
    *_reading_on(_NO_ALPHA, _NO_ALPHA, " ' "),
    (rf"[{_SIGNS}]\K'(?={_ALPHA})", " ' "),
    (rf"{_ALPHA}\K'(?={_NO_ALPHA})", " ' "),
    *_reading_on(_ALPHA, _ALPHA, " '"),
    (rf"[{_NUMBER}]\K'(?=s)", " '"),
    _full_stop(),
    (r"\.' *\z", " . ' "),
    ("&", "&amp;"),
    (r"\|", "&#124;"),
    ("<", "&lt;"),
    (">", "&gt;"),
    ("'", "&apos;"),
    ('"', "&quot;"),
    (r"\[", "&#91;"),
    (r"\]", "&#93;"),
)

_BEGIN, _END = f"(?<![^ {_JOINED}])", f"(?![^ {_JOINED}])"
_DOUBLE, _ANY_QUOTE = '(?:"|[„“]+)', "['\"„“`]+"


def _closing(quote: str, opening: str = "") -> Rule:
    """A mark behind every second one of equal quotes."""
    return rf"{_BEGIN}{opening}{quote}{_END}(?m:.*?)[ {_JOINED}]{quote}\K{_END}", _CLOSING


# Words between spaces -> text. A space that goes is marked first, so that words keep their borders.
JOINING: tuple[Rule, ...] = (
    (r"\A|\z", " "),
    (" @-@ ", "-"),
    ("&bar;", "|"),
    ("&#124;", "|"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&bra;", "["),
    ("&ket;", "]"),
    ("&quot;", '"'),
    ("&apos;", "'"),
    ("&#91;", "["),
    ("&#93;", "]"),
    ("&amp;", "&"),
    (" {2,}", " "),
    (r"\A +| +\z", ""),
    (rf"[{_ranges(_CJK)}]\K (?=[{_ranges(_CJK)}])", _JOINED),
    (rf"{_BEGIN}[(\[{{¿¡[\p{{Sc}}&&[^{_ranges(_NOT_MONEY)}]]]+\K ", _JOINED),
    (rf" (?=[,.?!:;\\%}}\])]+{_END})", _JOINED),
    (f" (?='[[{_ranges(_ALNUM)}]&&[^{_DIGIT}]])", _JOINED),
    _closing(_DOUBLE),
    _closing("'", f"(?<!s[ {_JOINED}])"),
    _closing("`"),
    _closing("``"),
    _closing("''"),
    (f" (?={_ANY_QUOTE}{_CLOSING})", _JOINED),
    (rf"s\K (?='{_END})", _JOINED),
    (rf"{_BEGIN}(?<!s{_JOINED}){_ANY_QUOTE}\K ", _JOINED),
    (f"[{_JOINED}{_CLOSING}]", ""),
)


def splitting() -> dict[str, Any]:
    """The normalizer of a tokenizer.json that writes a text as Moses cuts it."""
    return {"type": "Sequence", "normalizers": [_replace(rule) for rule in SPLITTING]}


def joining() -> list[dict[str, Any]]:
    """The steps of a decoder that write Moses' words, which are joined by spaces, as people do."""
    return [_replace(rule) for rule in JOINING]


def _replace(rule: Rule) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": rule[0]}, "content": rule[1]}
