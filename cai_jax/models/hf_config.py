"""A config.json of Hugging Face, read so that every wrong value is one line that names the file and the key."""

from cai_jax.errors import UserError


class Reader:
    """The values of a JSON object; `where` names it in errors. A key that is absent or null has no value."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def get(self, key):
        return self.values.get(key)

    def fail(self, message):
        raise UserError(f"{self.where}: {message}")

    def number(self, key, default=None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"'{key}' is {value!r}, not a number: correct it")
        return float(value)

    def size(self, key, default=None) -> int:
        value = self.number(key, default)
        if value < 1 or value != int(value):
            self.fail(f"'{key}' is {value:g}, not a positive whole number: correct it")
        return int(value)

    def choice(self, key, table: dict) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in table:
            self.fail(f"'{key}' is {value!r}; supported: {', '.join(table)}")
        return table[value]

    def texts(self, key) -> list[str]:
        """A list of texts; empty where there is no value."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self.fail(f"'{key}' is {value!r}, not a list of texts: correct it")
        return value

    def id(self, key) -> int | None:
        """A token id, or None where there is no value."""
        ids = self.ids(key)
        if len(ids) > 1 or isinstance(self.get(key), list):
            self.fail(f"'{key}' is {self.get(key)!r}, not a token id: correct it")
        return ids[0] if ids else None

    def ids(self, key) -> tuple[int, ...]:
        """Token ids, of a number or of a list of numbers; none where there is no value."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
            self.fail(f"'{key}' is {value!r}, not a token id or a list of them: correct it")
        return tuple(ids)

    def object(self, key) -> dict:
        """An object; empty where there is no value."""
        value = self.get(key) or {}
        if not isinstance(value, dict):
            self.fail(f"'{key}' is {value!r}, not an object: correct it")
        return value
