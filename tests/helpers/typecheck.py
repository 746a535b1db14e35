"""The run-time type checker of the tests: shapes and types of every lorakit signature; an int may stand for a float."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
