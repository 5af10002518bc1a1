-- registry.db as a registry of version 1 made it: no search, and every package an .apr file.
CREATE TABLE mixture_names (
    name VARCHAR NOT NULL,
    digest VARCHAR,
    last_digest VARCHAR NOT NULL,
    revision BIGINT NOT NULL,
    PRIMARY KEY (name),
    UNIQUE (digest),
    FOREIGN KEY(digest) REFERENCES mixtures (digest),
    UNIQUE (revision)
);
CREATE TABLE mixture_versions (
    publisher VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    PRIMARY KEY (publisher, name, version)
);
CREATE TABLE mixtures (
    digest VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    body BLOB NOT NULL,
    body_bytes BIGINT NOT NULL,
    shape JSON NOT NULL,
    gate_digest VARCHAR,
    gate_bytes BIGINT NOT NULL,
    package_digest VARCHAR,
    envelope BLOB NOT NULL,
    publisher VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    key_id VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    by_policy BOOLEAN NOT NULL,
    publish_time_us BIGINT NOT NULL,
    PRIMARY KEY (digest),
    FOREIGN KEY(package_digest) REFERENCES packages (digest)
);
CREATE TABLE nested_mixtures (
    parent VARCHAR NOT NULL,
    child VARCHAR NOT NULL,
    PRIMARY KEY (parent, child),
    FOREIGN KEY(parent) REFERENCES mixtures (digest),
    FOREIGN KEY(child) REFERENCES mixtures (digest)
);
CREATE TABLE packages (
    digest VARCHAR NOT NULL,
    size_bytes BIGINT NOT NULL,
    format VARCHAR NOT NULL,
    facts BLOB NOT NULL,
    metadata BLOB NOT NULL,
    embedded_key_id VARCHAR,
    embedded_trusted BOOLEAN NOT NULL,
    state VARCHAR NOT NULL,
    by_policy BOOLEAN NOT NULL,
    yank_explanation VARCHAR NOT NULL,
    publish_time_us BIGINT NOT NULL,
    proof_time_us BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    PRIMARY KEY (digest),
    UNIQUE (revision)
);
CREATE TABLE releases (
    publisher VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    key_id VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    envelope BLOB NOT NULL,
    state VARCHAR NOT NULL,
    publish_time_us BIGINT NOT NULL,
    PRIMARY KEY (publisher, name, version, key_id),
    FOREIGN KEY(digest) REFERENCES packages (digest)
);
CREATE TABLE revisions (
    newest BIGINT NOT NULL
);
CREATE TABLE revocations (
    key_id VARCHAR NOT NULL,
    explanation VARCHAR NOT NULL,
    revision BIGINT NOT NULL,
    PRIMARY KEY (key_id),
    UNIQUE (revision)
);
CREATE INDEX ix_mixtures_gate_digest ON mixtures (gate_digest);
CREATE INDEX ix_mixtures_key_id ON mixtures (key_id);
CREATE INDEX ix_mixtures_name ON mixtures (name);
CREATE INDEX ix_mixtures_package_digest ON mixtures (package_digest);
CREATE INDEX ix_nested_mixtures_child ON nested_mixtures (child);
CREATE INDEX ix_packages_embedded_key_id ON packages (embedded_key_id);
CREATE INDEX ix_releases_digest ON releases (digest);
CREATE INDEX ix_releases_key_id ON releases (key_id);
PRAGMA user_version = 1;
