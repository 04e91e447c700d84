"""English names of the ISO 639 codes that geonames uses for the main languages of the countries.

Codes that are not here are skipped, so a passage names only languages that a reader may know.
"""

from __future__ import annotations

_TABLE = """
aa Afar|af Afrikaans|ak Akan|am Amharic|ar Arabic|ay Aymara|az Azerbaijani|be Belarusian|bem Bemba|ber Berber
bg Bulgarian|bho Bhojpuri|bi Bislama|bm Bambara|bn Bengali|br Breton|bs Bosnian|ca Catalan|ch Chamorro|chk Chuukese
cmn Mandarin|cs Czech|cy Welsh|da Danish|de German|dv Dhivehi|dz Dzongkha|ee Ewe|el Greek|en English|es Spanish
et Estonian|fa Persian|fi Finnish|fil Filipino|fj Fijian|fo Faroese|fr French|fy Frisian|ga Irish|gag Gagauz
gd Gaelic|gil Gilbertese|gl Galician|gn Guarani|gv Manx|ha Hausa|hak Hakka|haw Hawaiian|he Hebrew|hi Hindi|hr Croatian
ht Creole|hu Hungarian|hy Armenian|id Indonesian|is Icelandic|it Italian|iu Inuktitut|ja Japanese|ka Georgian|kg Kongo
kk Kazakh|kl Greenlandic|km Khmer|ko Korean|kr Kanuri|ku Kurdish|ky Kyrgyz|la Latin|lb Luxembourgish|lg Ganda
ln Lingala|lo Lao|loz Lozi|lt Lithuanian|lv Latvian|men Mende|mg Malagasy|mh Marshallese|mi Maori|miq Miskito
mk Macedonian|mn Mongolian|mnk Mandinka|mos Mossi|ms Malay|mt Maltese|mwl Mirandese|my Burmese|na Nauruan|nb Norwegian
ne Nepali|niu Niuean|nl Dutch|no Norwegian|ny Chichewa|om Oromo|pa Punjabi|pap Papiamento|pau Palauan|pl Polish
ps Pashto|pt Portuguese|qu Quechua|rn Kirundi|ro Romanian|rom Romani|ru Russian|rw Kinyarwanda|se Sami|sg Sango
si Sinhala|sk Slovak|sl Slovene|sm Samoan|sn Shona|so Somali|sq Albanian|sr Serbian|ss Swazi|st Sotho|sv Swedish
sw Swahili|ta Tamil|tem Temne|tet Tetum|tg Tajik|th Thai|tig Tigre|tk Turkmen|tkl Tokelauan|tl Tagalog|tn Tswana
to Tongan|tr Turkish|tt Tatar|tum Tumbuka|tvl Tuvaluan|ty Tahitian|uk Ukrainian|ur Urdu|uz Uzbek|vi Vietnamese
wls Wallisian|wo Wolof|xh Xhosa|yao Yao|yo Yoruba|yue Cantonese|zh Chinese|zu Zulu
"""

_ENTRIES = _TABLE.replace("\n", "|").strip("|").split("|")
LANGUAGES: dict[str, str] = dict(entry.split(" ", 1) for entry in _ENTRIES)
"""ISO 639-1 or 639-3 code -> English name."""
