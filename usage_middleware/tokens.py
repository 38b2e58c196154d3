"""A key's :class:`Token`, and the :class:`TokenRecord` that stores exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONEncoder
from json.encoder import encode_basestring
from typing import Final

from .usage import DayUsage

#: The periods after which a quota may renew; the empty text: it does not.
RENEWALS: Final = ("", "daily", "weekly", "monthly")

#: What :func:`token_state` returns.
TOKEN_STATES: Final = ("active", "exhausted", "expired", "disabled")

_INTEGER_FIELDS: Final = (
    "total_available",
    "total_used",
    "expires_at",
    "created_at",
    "renewal_quota",
    "renews_at",
    "held",
)
BOOLEAN_FIELDS: Final = ("unlimited_quota", "model_limits_enabled", "enabled")
_UNITS: Final = {
    "expires_at": " of Unix seconds (0: never)",
    "created_at": " of Unix seconds",
    "renews_at": " of Unix seconds (0: never)",
}

_encode_json = JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """All that is known about one key. It is immutable, and its field names are those of the answer.

    Every field is checked when the token is made, so that the author of a store learns of a mistake at once and not
    from a client. An ``int`` field does not take a ``bool`` or a ``float``, a ``bool`` field does not take ``0`` or
    ``1``, and a ``str`` field does not take ``None``.

    :raises TypeError: a field has the wrong type; the message names the field.
    :raises ValueError: a field has the right type and an impossible value.

    >>> Token(name="Default Token", total_available=987655, total_used=12345).total_granted
    1000000
    """

    name: str = ""
    #: Quota units left; negative when overdrawn.
    total_available: int = 0
    #: Quota units used.
    total_used: int = 0
    #: With unlimited quota nothing is refused for lack of ``total_available``.
    unlimited_quota: bool = False
    #: From a model's name to the most quota units that it may use, or ``True`` if it has no limit of its own.
    model_limits: Mapping[str, int | bool] = field(default_factory=dict, hash=False)
    model_limits_enabled: bool = False
    #: Unix time in whole seconds; 0 or less: never.
    expires_at: int = 0
    enabled: bool = True
    #: The store's own number for the token, if it has one.
    id: int | None = None
    #: The key's last four characters, to distinguish tokens in lists.
    hint: str = ""
    #: Unix time in whole seconds; 0 if it is not known.
    created_at: int = 0
    #: How often the quota renews: ``""`` (it does not), ``"daily"``, ``"weekly"`` or ``"monthly"``, in UTC.
    renewal: str = ""
    #: The quota units that each period begins with.
    renewal_quota: int = 0
    #: Unix time in whole seconds at which the next period begins; 0: never.
    renews_at: int = 0
    #: The quota units that open reservations hold. They are part of ``total_used``.
    held: int = 0

    def __post_init__(self) -> None:
        # The request path makes a token for every answer, so an ordinary token costs only this one expression.
        if not (
            type(self.total_available) is type(self.total_used) is type(self.expires_at) is type(self.created_at) is int
            and type(self.renewal_quota) is type(self.renews_at) is type(self.held) is int
            and self.renewal in RENEWALS
            and type(self.unlimited_quota) is type(self.model_limits_enabled) is type(self.enabled) is bool
            and type(self.name) is type(self.hint) is str
            and self.name.isascii()
            and self.hint.isascii()
            and (type(self.id) is int or self.id is None)
        ):
            self._check_fields()
        # A copy, so that the token does not change with the mapping that it was made from.
        limits = self.model_limits
        object.__setattr__(self, "model_limits", {} if limits == {} else _checked_limits(limits))

    def _check_fields(self) -> None:
        for name in _INTEGER_FIELDS:
            _check_integer(name, getattr(self, name))
        for name in BOOLEAN_FIELDS:
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"Token.{name} must be True or False, got {getattr(self, name)!r}")
        _check_text("name", self.name)
        _check_text("hint", self.hint)
        if self.renewal not in RENEWALS:
            raise ValueError(f"Token.renewal must be one of {', '.join(map(repr, RENEWALS))}, got {self.renewal!r}")
        if self.id is not None:
            _check_integer("id", self.id)

    @property
    def total_granted(self) -> int:
        """All quota units that the token was ever granted: what is used and what is available."""
        return self.total_used + self.total_available


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """All that a store keeps of a token except its operations. It moves from one store to another."""

    #: Its ``id`` is its number in the store that it comes from.
    token: Token
    #: :func:`~.keys.key_digest` of its key.
    digest: bytes = field(repr=False)
    #: From a model's name to the quota units that it has used of the token.
    model_usage: Mapping[str, int] = field(default_factory=dict)
    #: Usage by day and model. Each pair occurs once.
    days: Sequence[DayUsage] = ()


def token_state(token: Token, now: float) -> str:
    """Return the token's state: usable, or the reason why it is not. It is one of :data:`TOKEN_STATES`.

    :param now: Unix time in seconds.
    """
    if not token.enabled:
        return "disabled"
    if 0 < token.expires_at <= now:
        return "expired"
    if token.total_available <= 0 and not token.unlimited_quota:
        return "exhausted"
    return "active"


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Token.{name} must be an int{_UNITS.get(name, '')}, got {value!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Token.{name} must be a str, got {value!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"Token.{name} must be text that UTF-8 can carry, got {value!r}") from None


def _checked_limits(limits: object) -> dict[str, int | bool]:
    if type(limits) is not dict and not isinstance(limits, Mapping):  # an ABC takes longer to ask
        raise TypeError(f"Token.model_limits must be a mapping of model names, got {limits!r}")
    checked = dict(limits)
    for model, limit in checked.items():
        _check_text("model_limits", model)
        if limit is True:
            continue
        if not isinstance(limit, int) or limit is False:
            raise TypeError(f"Token.model_limits[{model!r}] must be an int of quota units or True, got {limit!r}")
        if limit < 0:
            raise ValueError(f"Token.model_limits[{model!r}] must not be negative, got {limit!r}")
    return checked


def id_of(token: Token) -> int:
    """Return the id of a token that a store has loaded, which always has one."""
    assert token.id is not None
    return token.id


def wire_form(token: Token) -> str:
    """Return the token as the ``data`` object of a usage answer: compact JSON, its keys in the documented order.

    ``total_granted`` is computed here and never stored, so it is always the sum of the other two. The object is written
    out, not built as a dict: the order is visible, and it costs half as much as a JSON encoder.
    """
    return (
        '{"object":"token_usage","name":%s,"total_granted":%d,"total_used":%d,"total_available":%d,'
        '"unlimited_quota":%s,"model_limits":%s,"model_limits_enabled":%s,"expires_at":%d}'
    ) % (
        encode_basestring(token.name),
        token.total_used + token.total_available,
        token.total_used,
        token.total_available,
        "true" if token.unlimited_quota else "false",
        encode_model_limits(token.model_limits) if token.model_limits else "{}",
        "true" if token.model_limits_enabled else "false",
        token.expires_at if token.expires_at > 0 else 0,
    )


def encode_model_limits(limits: Mapping[str, int | bool]) -> str:
    """Return model limits as a compact JSON object, for the wire and for a text column."""
    return _encode_json(dict(limits)) if limits else "{}"
