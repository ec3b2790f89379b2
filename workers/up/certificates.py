"""A private authority and Redis' certificate, made once.

    python -m workers.up.certificates DIR HOST...     writes ca.crt, redis.crt and redis.key, unless they exist

The authority's key is thrown away: nobody can sign a second certificate with it. To renew, empty the folder.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from planner.errors import Conflict
from workers.disk.durable import write_whole

_VALID = dt.timedelta(days=3650)


def make(directory: Path, hosts: Sequence[str]) -> bool:
    """Write `ca.crt`, `redis.crt` (for `hosts`: names and addresses) and `redis.key`; False if they are there.

    Raises:
        Conflict: If those that are there are for other hosts.
    """
    wanted = [directory / name for name in ("redis.key", "redis.crt", "ca.crt")]
    if all(path.is_file() for path in wanted):
        _check_hosts(directory / "redis.crt", hosts)
        return False
    now = dt.datetime.now(dt.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name, name = _name("fairshard private authority"), _name(hosts[0])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(authority_name).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + _VALID)

    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    authority = (
        builder(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        builder(name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    contents = (secret, certificate.public_bytes(pem), authority.public_bytes(pem))
    for path, content in zip(wanted, contents, strict=True):  # ca.crt last: who finds it finds all
        write_whole(path, content, mode=0o600 if path.suffix == ".key" else 0o644)
    return True


def _check_hosts(path: Path, hosts: Sequence[str]) -> None:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    missing = [host for host in hosts if _host(host) not in names]
    if missing:
        raise Conflict(
            f"{path} is no certificate for {missing[0]}, but for {', '.join(str(name.value) for name in names)}: "
            f"empty {path.parent} to have a new one made (machines that joined then have to join again)",
            details={"path": str(path), "host": missing[0]},
        )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def main() -> None:
    """Make them in the folder that the command line names."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        print("made" if make(Path(sys.argv[1]), sys.argv[2:]) else "already there")
    except Conflict as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
