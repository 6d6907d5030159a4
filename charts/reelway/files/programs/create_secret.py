"""Creates a Secret with random values, unless it exists. Arguments: name, then the keys.

The program may create Secrets and nothing else: it cannot read or change one.
"""

import os
import secrets
import sys

from kubernetes import client, config

NAME, KEYS = sys.argv[1], sys.argv[2:]
CONFLICT = 409

config.load_incluster_config()
secret = client.V1Secret(
    metadata=client.V1ObjectMeta(name=NAME, labels={"app.kubernetes.io/part-of": "reelway"}),
    type="Opaque",
    string_data={key: secrets.token_hex(24) for key in KEYS},
)
try:
    client.CoreV1Api().create_namespaced_secret(os.environ["POD_NAMESPACE"], secret)
    print(f"Secret {NAME} created")
except client.ApiException as error:
    if error.status != CONFLICT:
        raise
    print(f"Secret {NAME} exists; it is kept")
