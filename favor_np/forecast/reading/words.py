"""What the words in the names of columns mean, in English and the usual European languages.

Names are compared without accents and capitals: "Schlußkurs", "clôture" and "AdjClose" are the
words schlusskurs, cloture, and adj with close.
"""

from __future__ import annotations

import functools
import re
import unicodedata


def plain(text: str) -> str:
    """Without capitals and accents."""
    text = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in text if not unicodedata.combining(c)).replace("ł", "l")


def _words(text: str) -> set[str]:
    return {plain(word) for word in text.split()}


CLOSE = _words("""
    close closes closing closed last latest settle settlement
    schluss schlusskurs schlusswert letzt letzte letzter zuletzt slot slotkoers laatste
    slut slutkurs stängning stängningskurs senaste sluttkurs siste lukket sidste seneste lukning
    clôture dernier dernière cierre último última chiusura ultimo fechamento fecho închidere
    zamknięcie ostatni ostatnio závěr závěrečná poslední záró utolsó päätös päätöskurssi
    kapanış şimdi son закрытие закр последняя 收盘 收盘价 終値 종가
""")
PRICE = _words("""
    price prices value kurs preis wert koers prijs pris prix cours valeur precio cotización valor
    prezzo quotazione valore preço cotação cena fiyat цена 价格 価格 가격
""")
ADJUSTED = _words("""
    adj adjust adjusted bereinigt bereinigter gecorrigeerd justerad ajusté ajustée ajustado ajustada
    rettificato
""")
# Prices, but not the one at the end of a bar: taken only where there is no other.
OTHER_PRICE = _words("""
    open opening high low bid ask mid mean median average avg weighted typical vwap wap wma sma ema
    erster start startkurs eröffn eröffnung eröffnungs eroeffnung eroeffnungs hoch höchst tief
    tiefst geld brief mittelkurs durchschnitt hoog laag öppning högst lägst högsta lägsta åpning
    åbning høj lav høyeste laveste ouv ouverture haut bas moyen moyenne apertura máximo mínimo medio
    media promedio ponderado massimo minimo abertura máxima mínima deschidere maxim minim otwarcie
    najwyższy najniższy otevření otvírání nyitó avaus ylin alin max min açılış yüksek düşük
    откр макс мин 开盘 最高 最低 始値 高値 安値 시가 고가 저가
""")
NOT_PRICE = _words("""
    volume volumes vol volumen volum volym volumi volumul wolumen wol hacim hac объем 成交量 出来高 거래량
    turnover umsatz umsätze omzet omsättning obrót objem obrat forgalom vaihto 成交额 amount amt betrag
    qty quantity size count stück stücke stuecke trades transactions interest oi openint cap
    change changes chg changed percent pct perc return returns ret yield rendite rendement diff
    difference differenz variation variazione variación variação var veränderung verschil zmiana
    změna fark изм 涨跌幅 대비 prev previous prior yesterday vortag dividend dividends div split splits
    spread ratio factor coefficient volatility sigma trend signal flag flags status
    id no nr num number row rank weight shares lots orders load demand supply generation production
    growth gain loss pnl profit drawdown beta correlation score probability
    date time datetime timestamp datum zeit uhrzeit fecha hora heure tarih
""")
DATE = _words("""
    date datetime timestamp time times day days week month months quarter year years period epoch
    unix ts observation snapped hour hours hr
    datum tag tage woche monat jahr zeit zeitpunkt zeitraum uhrzeit periode stunde dag maand jaar
    tijd tijdstip tid tidpunkt dato månad år fecha hora día mes año periodo data giorno mese anno
    ora jour mois année heure ano czas dzień miesiąc rok okres idopont nap pvm päivä aika tarih gün
    ay saat
    дата время день месяц год 日期 时间 日付 日時 날짜 일자
""")
CLOCK = _words("""
    time times clock hour hours hr hrs he minute ending interval zeit uhrzeit stunde stunden std uur
    tijd tid timme aika hora heure ora czas godzina saat время час
""")
YEAR = _words("year years yr jahr jaar år année año ano anno rok год")
MONTH = _words("month months mon monat maand månad mois mes mese miesiąc period месяц")
QUARTER = _words("quarter qtr quartal kwartaal kwartał kvartal trimestre")
WEEK = _words("week woche vecka uke uge semana semaine settimana tydzień")
DAY = _words("day tag dag jour día dia giorno dzień день")
SYMBOL = _words("""
    symbol symbols ticker tickers instrument instruments asset coin pair isin wkn cusip sedol ric
    security securities secid stock commodity contract series name country region location area
    zone hub node maturity expiry expiration tenor strike kürzel kuerzel wertpapier titre titolo
    símbolo acción activo walor
""")
_OTHERS = _words("market trade exchange index rate spot")  # of compounds such as "marketcap"
_KNOWN = CLOSE | PRICE | ADJUSTED | OTHER_PRICE | NOT_PRICE | DATE | CLOCK | SYMBOL | _OTHERS


@functools.lru_cache(maxsize=1024)
def words(name: str) -> frozenset[str]:
    """Split a column's name: "AdjClose", "adj_close" and "adjclose" are all adj and close."""
    found: set[str] = set()
    name = re.sub(r"\badjusted for .*", "", name, flags=re.IGNORECASE)  # splits and dividends
    for word in re.findall(r"[^\W\d_]+", re.sub(r"([^\W\d_A-Z])([A-Z])", r"\1 \2", name)):
        found.update(_parts(plain(word)))
    return frozenset(found)


def _parts(word: str) -> list[str]:
    """The known words that a compound is made of, or itself, and what it begins or ends with."""
    if word in _KNOWN or len(word) > 60:
        return [word]
    for cut in range(len(word) - 2, 2, -1):
        if word[:cut] in _KNOWN:
            rest = _parts(word[cut:])
            if _KNOWN.issuperset(rest):
                return [word[:cut], *rest]
    long = (part for part in NOT_PRICE if len(part) > 5)  # as in Handelsvolumen, Vortageskurs
    return [word, *(part for part in long if word.startswith(part) or word.endswith(part))]


def known(name: str) -> bool:
    """Whether a name says what its column is: a price, a time or another quantity."""
    return not (_KNOWN - SYMBOL).isdisjoint(words(name))


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
