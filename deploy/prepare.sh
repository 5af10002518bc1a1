#!/bin/sh
# What `docker compose up` needs beforehand: the tokens, and folders that say whose signatures count, and which base
# models may be served.
# Run it again at any time: what is there stays.
set -eu
cd "$(dirname "$0")/.."

# Containers get the hash of the admin token alone: they check it, and cannot use it.
# On this machine only you can enter the folder. In it the files are readable, for a container's user is another.
mkdir -p -m 700 deploy/secrets
mkdir -p -m 755 trust bases models
for name in admin worker; do
    file=deploy/secrets/${name}_token
    if [ ! -s "$file" ]; then
        head -c 32 /dev/urandom | base64 > "$file.new"
        chmod 444 "$file.new"
        mv "$file.new" "$file"
    fi
done
file=deploy/secrets/admin_token
printf 'sha256:%s\n' "$(tr -d '\n' < $file | sha256sum | cut -d ' ' -f 1)" > $file.sha256.new
chmod 444 $file.sha256.new
mv $file.sha256.new $file.sha256
