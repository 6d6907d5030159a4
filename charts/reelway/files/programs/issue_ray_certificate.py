"""Issues the certificate of one Ray pod. Arguments: folder with the CA (tls.crt, tls.key), target folder, namespace.

The names are the pod's address (POD_IP), the loopback addresses and the namespace's Services, by which workers reach
the head. The certificate is valid as long as the CA's, because Ray reads it once.
"""

import datetime
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

source, target, namespace = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
authority = x509.load_pem_x509_certificate((source / "tls.crt").read_bytes())
authority_key = serialization.load_pem_private_key((source / "tls.key").read_bytes(), password=None)
key = ec.generate_private_key(ec.SECP256R1())
addresses = {os.environ["POD_IP"], "127.0.0.1", "::1"}
names = ["localhost", f"*.{namespace}.svc", f"*.{namespace}.svc.cluster.local"]
subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "reelway-ray")])
certificate = (
    x509.CertificateBuilder()
    .subject_name(subject)
    .issuer_name(authority.subject)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5))
    .not_valid_after(authority.not_valid_after_utc)
    .add_extension(
        x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address(one)) for one in sorted(addresses)]
            + [x509.DNSName(one) for one in names]
        ),
        critical=False,
    )
    .add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    .sign(authority_key, hashes.SHA256())
)
pem = serialization.Encoding.PEM
with os.fdopen(os.open(target / "tls.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
    file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
(target / "tls.crt").write_bytes(certificate.public_bytes(pem))
(target / "ca.crt").write_bytes(authority.public_bytes(pem))
print(f"certificate issued for {', '.join(sorted(addresses))}")
