#!/bin/sh
# A private certificate authority and a certificate for each service, to try TLS and mTLS with.
#
#   deploy/certificates.sh FOLDER [NAME[,OTHER_NAME...]]...
#
# Each certificate is good for NAME, the other names or addresses, localhost, 127.0.0.1 and ::1, as a server and as a
# client, for DAYS (default 90). Without names there is one for each service. Run it again to renew: the authority
# stays, so whoever trusts it goes on. FOLDER/ca.key can make any certificate: keep it off the machines that serve.
set -euf

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1
shift
[ $# -ge 1 ] || set -- router aggregator registry worker

days=${DAYS:-90}
umask 077
mkdir -p "$folder"
work=$(mktemp -d "$folder/.new.XXXXXX") # in the same file system, so that each file is replaced at once
trap 'rm -rf "$work"' EXIT

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

if [ ! -f "$folder/ca.key" ]; then
    new_key "$folder/ca.key"
    cat > "$work/ca.conf" <<END
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = Hocket private authority
[extensions]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END
    openssl req -new -x509 -config "$work/ca.conf" -key "$folder/ca.key" -days 3650 -out "$folder/ca.pem"
    chmod 644 "$folder/ca.pem"
fi

for names in "$@"; do
    name=${names%%,*}
    subjects="DNS:localhost, IP:127.0.0.1, IP:::1"
    for subject in $(printf %s "$names" | tr , ' '); do
        case $subject in
            *:*) subjects="$subjects, IP:$subject" ;;
            *[!0-9.]*) subjects="$subjects, DNS:$subject" ;;
            *) subjects="$subjects, IP:$subject" ;;
        esac
    done
    cat > "$work/leaf.conf" <<END
subjectAltName = $subjects
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
    new_key "$work/key"
    openssl req -new -key "$work/key" -subj "/CN=$name" -out "$work/request"
    openssl x509 -req -in "$work/request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -days "$days" \
        -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/leaf.conf" -out "$work/certificate" 2>/dev/null
    chmod 644 "$work/certificate"
    mv "$work/key" "$folder/$name.key"
    mv "$work/certificate" "$folder/$name.pem"
done
