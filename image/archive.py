#!/usr/bin/env python3
"""Writes a container image as an archive, without an engine: one layer, made from files.

usage: archive.py ARCHIVE NAME[:TAG] [options] PATH=SOURCE ...

SOURCE is a file, which becomes PATH with mode 0755 if it is executable and 0644 if not, or a directory,
whose content is put below PATH. Everything belongs to root and has no time, so the same files give the
same archive.

The archive has the form of `docker save`: docker, podman, ctr and `kind load image-archive` read it.
Prints the name, the size of the compressed layer in bytes and the image's digest.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile

# linux/capability.h
VFS_CAP_REVISION_2 = 0x02000000
CAP_NET_ADMIN = 12


def main():
    arguments = parse()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add_all(tar, arguments.content, arguments.net_admin)
    packed = gzip.compress(layer.getvalue(), compresslevel=arguments.level, mtime=0)
    config = {
        "architecture": arguments.architecture,
        "os": "linux",
        "config": image_config(arguments),
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest(layer.getvalue())]},
        "history": [{"created_by": "image/archive.py"}],
    }
    config = json.dumps(config, sort_keys=True).encode()
    config_name, layer_name = digest(config) + ".json", digest(packed) + ".tar.gz"
    manifest = [{"Config": config_name, "RepoTags": [arguments.name, *arguments.also], "Layers": [layer_name]}]
    # It gets its name when it is complete.
    unfinished = arguments.archive + ".tmp"
    with tarfile.open(unfinished, "w") as tar:
        for name, content in [
            ("manifest.json", json.dumps(manifest).encode()),
            (config_name, config),
            (layer_name, packed),
        ]:
            add(tar, name, content, 0o644)
    os.replace(unfinished, arguments.archive)
    print(f"{arguments.name}\t{len(packed)}\tsha256:{digest(config)}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("name", metavar="NAME[:TAG]")
    parser.add_argument("content", nargs="*", metavar="PATH=SOURCE")
    parser.add_argument("--also", action="append", default=[], metavar="NAME[:TAG]", help="another name")
    parser.add_argument("--architecture", default="amd64")
    parser.add_argument("--entrypoint", action="append", default=[], metavar="WORD")
    parser.add_argument("--cmd", action="append", default=[], metavar="WORD")
    parser.add_argument("--user", default="", metavar="UID:GID")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--level", type=int, default=9, help="of compression, 0 to 9")
    parser.add_argument(
        "--net-admin",
        metavar="PATH",
        help="this file may change the network's settings where the container may; as `setcap cap_net_admin=p`",
    )
    return parser.parse_intermixed_args()


def image_config(arguments):
    config = {
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Entrypoint": arguments.entrypoint,
        "Cmd": arguments.cmd,
        "User": arguments.user,
        "Labels": dict(label.split("=", 1) for label in arguments.label),
    }
    return {key: value for key, value in config.items() if value}


def add_all(tar, content, net_admin):
    made = set()
    for item in content:
        path, source = item.split("=", 1)
        path = path.strip("/")
        if os.path.isdir(source):
            tar.add(source, arcname=path or ".", filter=without_origin)
            continue
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if parent not in made:
                made.add(parent)
                add(tar, parent, b"", 0o755, tarfile.DIRTYPE)
        with open(source, "rb") as file:
            mode = 0o755 if os.access(source, os.X_OK) else 0o644
            attributes = {}
            if net_admin and path == net_admin.strip("/"):
                attributes["SCHILY.xattr.security.capability"] = capability().decode("latin-1")
            add(tar, path, file.read(), mode, attributes=attributes)


def capability():
    """The extended attribute of a file: permitted, neither effective nor inheritable
    (`struct vfs_cap_data`)."""
    permitted, inheritable = 1 << CAP_NET_ADMIN, 0
    return struct.pack("<5L", VFS_CAP_REVISION_2, permitted, inheritable, 0, 0)


def add(tar, name, content, mode, kind=tarfile.REGTYPE, attributes=None):
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size = kind, mode, len(content)
    member.pax_headers = attributes or {}
    tar.addfile(member, io.BytesIO(content))


def without_origin(member):
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def digest(content):
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
