//! "Did you mean": the known key closest to one that is not known.

use super::schema::join;

/// The dotted path that was probably meant by `key`, an unknown key of a table with `keys`.
///
/// `path` is the key's own dotted path and `known` every key there is.
pub(crate) fn key(path: &str, key: &str, keys: &[&str], known: &[String]) -> Option<String> {
    let table = path
        .strip_suffix(key)
        .unwrap_or_default()
        .trim_end_matches('.');
    let tolerated = (key.chars().count() / 3).max(1);
    let typo = keys
        .iter()
        .map(|candidate| (distance(key, candidate), *candidate))
        .filter(|(distance, _)| *distance <= tolerated)
        .min()
        .map(|(_, candidate)| join(table, candidate));
    typo
        // EXPROTO_BROKER_URL for EXPROTO_BROKER__URL.
        .or_else(|| {
            known
                .iter()
                .find(|known| flat(known) == flat(path))
                .cloned()
        })
        // The right key in the wrong table, when there is only one it can be.
        .or_else(|| {
            let suffix = format!(".{key}");
            let mut homes = known.iter().filter(|known| known.ends_with(&suffix));
            homes.next().filter(|_| homes.next().is_none()).cloned()
        })
}

/// What a key of EMQX's is here, for an unknown key of an authenticator or a source of rules.
pub(crate) fn emqx_key(path: &str) -> Option<&'static str> {
    let (table, key) = path.rsplit_once('.')?;
    if !table.starts_with("authentication") && !table.starts_with("authorization") {
        return None;
    }
    Some(match key {
        "use_jwks" => "here the keys come from endpoint or jwks_file (JWKS), public_key or secret",
        "algorithm" => "here the key says it: secret is for HS256, public_key for RS256 and ES256",
        "certificate" if !table.ends_with(".ssl_options") => {
            "here it is public_key, the path of a file"
        }
        "ssl" => "here it is ssl_options",
        "password_hash_algorithm" => "here each hash of the file says how it was made",
        "filename" => "here it is path",
        "cache" => "here it is cache_max_size and cache_ttl",
        "enable_pipelining" | "max_inactive" | "max_retries" | "retry_interval"
        | "precondition" => "here there is none: leave it out",
        _ => return None,
    })
}

/// What a value of EMQX's is here, for one that `key` cannot have.
pub(crate) fn emqx_value(key: &str, value: &str) -> Option<&'static str> {
    Some(match (key, value) {
        ("backend", "built_in_database") => {
            "here users are in a file: \"file\", see exproto-sidecar passwd"
        }
        ("type", "built_in_database") => "here rules are in a file: \"file\"",
        ("backend" | "type", "mysql" | "postgresql" | "mongodb" | "redis" | "ldap") => {
            "here a service of yours may ask it: \"http\""
        }
        ("backend", "jwt") | ("mechanism", "jwks") => "here it is mechanism = \"jwt\"",
        ("mechanism", "http" | "file" | "mqtt" | "built_in_database") => {
            "here that is a backend, with mechanism = \"password_based\""
        }
        ("mechanism", "scram" | "gssapi" | "cinfo") => "here there is none",
        _ => return None,
    })
}

fn flat(path: &str) -> String {
    path.replace('.', "_")
}

/// Edits (insert, delete, replace, swap of neighbours) between two words.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let at = |row: &[usize], i: usize| row.get(i).copied().unwrap_or(usize::MAX / 2);
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, cb) in b.iter().enumerate() {
            let replaced = at(&last, j) + usize::from(ca != cb);
            let mut best = replaced.min(at(&last, j + 1) + 1).min(at(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(cb) && b.get(j - 1) == Some(ca);
            if swapped {
                best = best.min(at(&before_last, j - 1) + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    at(&last, b.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_edits() {
        for (a, b, edits) in [
            ("url", "url", 0),
            ("ulr", "url", 1),
            ("bnd", "bind", 1),
            ("", "abc", 3),
            ("abc", "xyz", 3),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }

    #[test]
    fn suggestions_look_beside_then_elsewhere() {
        let known = ["broker.url".to_owned(), "broker.pool_size".to_owned()];
        let suggest = |path, name, keys: &[&str]| key(path, name, keys, &known);
        assert_eq!(
            suggest("broker.ulr", "ulr", &["url"]).as_deref(),
            Some("broker.url")
        );
        assert_eq!(
            suggest("broker_url", "broker_url", &["log"]).as_deref(),
            Some("broker.url")
        );
        assert_eq!(
            suggest("pool_size", "pool_size", &["log"]).as_deref(),
            Some("broker.pool_size")
        );
        assert_eq!(suggest("zzz", "zzz", &["log"]), None);
    }
}
