"""What the words in the names of columns mean, in English and the usual European languages.

Names are compared without accents and capitals: "Schlußkurs", "clôture" and "AdjClose" are the
words schlusskurs, cloture, and adj with close.
"""

from __future__ import annotations

import functools
import re
import unicodedata

CLOSE = set(
    "close closes closing closed last latest settle settlement schluss schlusskurs schlusswert letzter letzte "
    "letzt zuletzt cloture dernier derniere cierre ultimo ultima chiusura fechamento fecho slot "
    "slotkoers laatste slut slutkurs stangning stangningskurs senaste lukket sluttkurs siste sidste "
    "seneste zamkniecie ostatni ostatnio posledni zaveraci kapanis simdi son zaro utolso закрытие "
    "закр последняя zaver zaverecna paatos paatoskurssi inchidere lukning "
    "收盘 收盘价 終値 종가".split()
)
PRICE = set(
    "price prices value kurs preis prix cours precio prezzo quotazione preco cotacao cotizacion koers "
    "prijs pris cena fiyat wert valeur valor valore цена 价格 価格 가격".split()
)
ADJUSTED = set(
    "adj adjusted adjust bereinigt bereinigter ajuste ajustee ajustado ajustada rettificato justerad "
    "gecorrigeerd".split()
)
# A price, but not the one at the end of the bar: taken only where it is the only one.
OTHER_PRICE = set(
    "open opening high low bid ask mid weighted average avg typical mean vwap wap median erster "
    "eroffnung eroffnungs eroeffnung eroffn hoch hochst tief tiefst geld brief start startkurs apertura "
    "maximo minimo massimo minimo ouverture ouv haut bas abertura maxima minima hoog laag hogst lagst oppning "
    "hogsta lagsta otwarcie najwyzszy najnizszy max min opn acilis yuksek dusuk nyito откр макс мин "
    "otevreni otvirani avaus ylin alin abning høj lav hoyeste laveste deschidere maxim minim åpning apning "
    "开盘 最高 最低 始値 高値 安値 durchschnitt mittelkurs moyenne moyen promedio media medio ponderado wma "
    "sma ema".split()
)
NOT_PRICE = set(
    "volume volumes vol volumen volum volym volumi wolumen wol hac hacim change changes chg changed percent pct "
    "perc date time datetime timestamp prev previous prior vortag qty quantity size count trades "
    "transactions cap turnover umsatz umsatze omsattning obrot return returns ret yield rendite rendement diff difference "
    "differenz variation variazione variacion variacao var veranderung verschil zmiana zmena fark изм объем объём "
    "interest oi openint amount amt betrag stuck stucke stuecke dividend dividends div splits split spread ratio factor "
    "coefficient volatility sigma id number num no nr row rank weight "
    "trend signal flag flags status zeit datum uhrzeit fecha hora heure tarih "
    "objem obrat forgalom omzet volumul vaihto "
    "成交量 成交额 涨跌幅 出来高 거래량".split()
)
DATE = set(
    "date datetime timestamp day days month months period unix epoch ts year years week quarter time times "
    "datum tag tage periode periodo okres monat jahr zeit zeitpunkt zeitraum woche fecha dia mes ano anio data giorno mese anno jour mois "
    "annee dato tidpunkt tid dag maned manad ar dzien miesiac rok datetimes pvm paivays tarih gun ay "
    "datumi nap idopont tijd tijdstip maand jaar дата время день месяц год 日期 时间 日付 日時 날짜 "
    "observation snapped uhrzeit hora heure ora czas saat aika stunde hour hours hr".split()
)
CLOCK = set(
    "time times hour hours hr hrs he stunde stunden std uhrzeit zeit hora heure ora godzina uur timme "
    "time saat czas tid tijd aika clock minute ending interval время час".split()
)
YEAR = set("year yr jahr annee ano anio anno rok jaar ar год".split())
MONTH = set("month mon monat mois mes mese miesiac maand manad maned месяц period".split())
DAY = set("day tag jour dia giorno dzien dag день".split())
SYMBOL = set(
    "symbol symbols ticker tickers instrument instruments asset coin pair isin wkn cusip sedol ric "
    "security securities stock commodity contract secid country region location area zone hub node "
    "series name wertpapier kurzel kuerzel titre titolo simbolo accion activo walor instrumento".split()
)
_NEUTRAL = {"market", "trade", "index", "rate", "spot", "day", "adj"}
_KNOWN = CLOSE | PRICE | ADJUSTED | OTHER_PRICE | NOT_PRICE | DATE | CLOCK | SYMBOL | _NEUTRAL


def plain(text: str) -> str:
    """Without capitals and accents."""
    text = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in text if not unicodedata.combining(c)).replace("ł", "l")


@functools.lru_cache(maxsize=1024)
def words(name: str) -> frozenset[str]:
    """Split a column's name: "AdjClose", "adj_close" and "adjclose" are all adj and close."""
    found: set[str] = set()
    for word in re.findall(r"[^\W\d_]+", re.sub(r"([^\W\d_A-Z])([A-Z])", r"\1 \2", name)):
        found.update(_parts(plain(word)))
    return frozenset(found)


def _parts(word: str) -> list[str]:
    """The known words that a compound is made of; the compound where it is not made of such."""
    if word in _KNOWN:
        return [word]
    for cut in range(len(word) - 2, 2, -1):
        if word[:cut] in _KNOWN:
            rest = _parts(word[cut:])
            if _KNOWN.issuperset(rest):
                return [word[:cut], *rest]
    return [word]


def known(name: str) -> bool:
    """Whether a name says what its column is."""
    return not _KNOWN.isdisjoint(words(name))


def is_close(name: str) -> bool:
    """A price at the end of a bar, or just a price."""
    found = words(name)
    return not found.isdisjoint(CLOSE | PRICE) and found.isdisjoint(NOT_PRICE | OTHER_PRICE)


def is_adjusted(name: str) -> bool:
    """A price that knows splits and dividends."""
    return not words(name).isdisjoint(ADJUSTED)


def is_no_price(name: str) -> bool:
    """A volume, a change, a time."""
    return not words(name).isdisjoint(NOT_PRICE)


def is_date(name: str) -> bool:
    """A time, a day, a period."""
    return not words(name).isdisjoint(DATE)


def is_clock(name: str) -> bool:
    """A time of day, or an hour."""
    return not words(name).isdisjoint(CLOCK)


def is_symbol(name: str) -> bool:
    """What a row is about, where a file has several series."""
    return not words(name).isdisjoint(SYMBOL)
