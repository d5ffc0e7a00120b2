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
