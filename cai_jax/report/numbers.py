"""Numbers as a reader wants them: shares in percent, intervals beside values, a dash for what is missing."""

import datetime
import math

from cai_jax.report.markup import Html, el

DASH = "–"


def known(value) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value, digits: int = 2) -> str:
    """A number with its thousands separated; a dash for null, NaN and infinity."""
    return f"{value:,.{digits}f}".replace("-", "−") if known(value) else DASH


def count(value) -> str:
    return f"{value:,}" if known(value) else DASH


def percent(value) -> str:
    """A share 0..1 in percent; one decimal only where rounding would say 0% or 100% of something else."""
    if not known(value):
        return DASH
    share = 100 * value
    hidden = (0 < share < 0.5) or (99.5 <= share < 100)
    return f"{share:.1f}%" if hidden else f"{share:.0f}%"


def small(value) -> str:
    """A number of unknown scale, such as a learning rate."""
    return f"{value:.3g}".replace("-", "−") if known(value) else DASH


def part(interval, key: str = "value"):
    """A field of an INTERVAL, None when the interval or the field is null."""
    value = (interval or {}).get(key)
    return value if known(value) else None


def bounds(interval, form=number) -> str:
    """'[12%, 43%]', or '' when a bound is missing."""
    low, high = part(interval, "low"), part(interval, "high")
    return f"[{form(low)}, {form(high)}]" if low is not None and high is not None else ""


def estimate(interval, form=number) -> str:
    """Value and interval in a sentence."""
    return f"{form(part(interval))} {bounds(interval, form)}".strip()


def estimate_cell(interval, form=number, with_n: bool = False) -> Html:
    """Value with its interval in smaller type below, for a table."""
    value = part(interval)
    if value is None:
        return el("span", DASH)
    n = f" n {count(part(interval, 'n'))}" if with_n else ""
    return Html(
        el("span", form(value), class_="value") + el("span", bounds(interval, form) + n, class_="range")
    )


def duration(seconds) -> str:
    if not known(seconds):
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(size) -> str:
    """Bytes in GiB, or MiB below one."""
    if not known(size):
        return DASH
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def moment(started) -> str:
    """A start time, recorded as seconds since 1970 or as ISO 8601 text; any other text is shown as it is."""
    if not known(started) and not started:
        return DASH
    try:
        if known(started):
            time = datetime.datetime.fromtimestamp(started, datetime.UTC)
        else:
            time = datetime.datetime.fromisoformat(started)
    except (ValueError, TypeError, OverflowError):
        return str(started)
    return time.strftime("%Y-%m-%d %H:%M %Z").strip()
