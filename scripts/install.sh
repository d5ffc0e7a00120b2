#!/usr/bin/env bash
# Installs what building and testing needs from Debian's packages, if it is missing.
set -euo pipefail

# Debian keeps Mosquitto where only root's PATH looks.
export PATH="$PATH:/usr/sbin"

install_packages() {
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then sudo=(sudo); fi
    "${sudo[@]}" apt-get update -q
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -q -y --no-install-recommends "$@"
}

missing=()
command -v mosquitto >/dev/null || missing+=(mosquitto)
command -v mosquitto_sub >/dev/null || missing+=(mosquitto-clients)
command -v cc >/dev/null || missing+=(build-essential)
command -v make >/dev/null || missing+=(make)
# OpenSSL is built along; its Configure needs more than perl-base.
perl -MFindBin -MIPC::Cmd -MFile::Compare -e1 2>/dev/null || missing+=(perl)
# Devices of the DTLS tests.
command -v openssl >/dev/null || missing+=(openssl)
command -v gnutls-cli >/dev/null || missing+=(gnutls-bin)
[ -e /usr/include/mbedtls/ssl.h ] || missing+=(libmbedtls-dev)
# Networks in which packets are dropped.
command -v ip >/dev/null || missing+=(iproute2)
command -v python3 >/dev/null || missing+=(python3)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ "${#missing[@]}" -gt 0 ]; then
    echo "installing: ${missing[*]}"
    install_packages "${missing[@]}"
fi
