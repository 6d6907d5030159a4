"""Feast's Redis online store, connected by an address without a password.

Feast's own setting is a ``host:port,name=value`` string. It cannot hold an IPv6 host or a password with a comma, and a
password in it would be in ``feature_store.yaml``. A password of digits would become a number.
"""

from __future__ import annotations

from typing import Final

from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from pydantic import StrictStr
from redis import Redis
from redis import asyncio as redis_asyncio

from reelway.platform.features.redis_address import client_options, parse_redis_address

_TYPE: Final = "reelway.platform.features.redis_store.RedisAddressOnlineStore"


class RedisAddressOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """Settings of ``RedisAddressOnlineStore``; Feast finds this class by its name."""

    type: str = _TYPE
    address: StrictStr
    """See ``redis_address``. A password is taken from the environment, not from here."""


class RedisAddressOnlineStore(RedisOnlineStore):  # type: ignore[misc]
    """The Redis store with a client for ``address``."""

    _client: Redis | None = None
    _client_async: redis_asyncio.Redis | None = None

    def _get_client(self, online_store_config: RedisAddressOnlineStoreConfig) -> Redis:
        if not self._client:
            self._client = Redis(**client_options(parse_redis_address(online_store_config.address)))
        return self._client

    async def _get_client_async(self, online_store_config: RedisAddressOnlineStoreConfig) -> redis_asyncio.Redis:
        if not self._client_async:
            options = client_options(parse_redis_address(online_store_config.address))
            self._client_async = redis_asyncio.Redis(**options)
        return self._client_async
