//! How a filter lies to those of a [`Trie`]: is it covered, does it overlap?
//!
//! Both walk the tree like a match does, with a filter in the place of the topic.
//! They cost as much, except that `+` in a filter asked for overlaps looks at all
//! children of a node until one overlaps.

use super::{ROOT, Trie, child_of};
use crate::broker::topic::TopicFilter;

#[derive(Clone, Copy)]
enum Part {
    /// The level's id, where any filter of the tree has it.
    Text(Option<u32>),
    Plus,
    Hash,
}

impl<V> Trie<V> {
    fn parts(&self, filter: &TopicFilter) -> Vec<Part> {
        let levels = filter.filter().split('/');
        levels
            .map(|level| match level {
                "+" => Part::Plus,
                "#" => Part::Hash,
                text => Part::Text(self.levels.get(text).map(|level| level.id)),
            })
            .collect()
    }

    fn child(&self, at: u32, level: Option<u32>) -> Option<u32> {
        let child = child_of(&self.nodes, &self.children, at, level?);
        (child != ROOT).then_some(child)
    }

    /// The value of a filter that matches all topics that `filter` matches and is
    /// `accepted`; of `filter` itself, if it is here. That `+/#` covers `#` is not
    /// noticed.
    pub fn covering(&self, filter: &TopicFilter, accepted: impl Fn(&V) -> bool) -> Option<&V> {
        let parts = self.parts(filter);
        let wild_from = usize::from(filter.filter().starts_with('$'));
        let value = |at: u32| {
            self.node(at)?
                .value
                .as_ref()
                .filter(|value| accepted(value))
        };
        let mut stack = vec![(ROOT, 0)];
        while let Some((at, depth)) = stack.pop() {
            let Some(node) = self.node(at) else { continue };
            let is_wild = depth >= wild_from;
            if is_wild
                && node.hash != ROOT
                && let Some(value) = value(node.hash)
            {
                return Some(value);
            }
            let plus = Some(node.plus).filter(|at| *at != ROOT);
            let next = match parts.get(depth) {
                None => match value(at) {
                    Some(value) => return Some(value),
                    None => continue,
                },
                // Nothing but `#` covers `#`.
                Some(Part::Hash) => continue,
                Some(Part::Plus) => [plus, None],
                Some(Part::Text(level)) => [plus.filter(|_| is_wild), self.child(at, *level)],
            };
            stack.extend(next.into_iter().flatten().map(|at| (at, depth + 1)));
        }
        None
    }

    /// Whether there is a topic that `filter` and a filter of this tree both match.
    pub fn overlaps(&self, filter: &TopicFilter) -> bool {
        let parts = self.parts(filter);
        let wild_from = usize::from(filter.filter().starts_with('$'));
        // With each node whether its later siblings are to be looked at too.
        let mut stack = vec![(ROOT, 0, false)];
        while let Some((at, depth, siblings)) = stack.pop() {
            let Some(node) = self.node(at) else { continue };
            if siblings {
                if node.next != ROOT {
                    stack.push((node.next, depth, true));
                }
                // Only a filter's wildcard leads to siblings.
                if node.dollar {
                    continue;
                }
            }
            let is_wild = depth >= wild_from;
            if is_wild && node.hash != ROOT {
                return true;
            }
            match parts.get(depth) {
                None if node.value.is_some() => return true,
                None => {}
                Some(Part::Hash) => {
                    // No node without children or a value stays, so whatever is below
                    // holds a filter; except that at the root `$` is not for wildcards.
                    if node.value.is_some() || node.plus != ROOT {
                        return true;
                    }
                    if depth > 0 && node.first_child != ROOT {
                        return true;
                    }
                    if self.has_plain_child(node.first_child) {
                        return true;
                    }
                }
                Some(Part::Plus) => {
                    if node.plus != ROOT {
                        stack.push((node.plus, depth + 1, false));
                    }
                    if node.first_child != ROOT {
                        stack.push((node.first_child, depth + 1, true));
                    }
                }
                Some(Part::Text(level)) => {
                    if is_wild && node.plus != ROOT {
                        stack.push((node.plus, depth + 1, false));
                    }
                    if let Some(child) = self.child(at, *level) {
                        stack.push((child, depth + 1, false));
                    }
                }
            }
        }
        false
    }

    /// Whether this child or a later sibling does not begin with `$`.
    fn has_plain_child(&self, first: u32) -> bool {
        let mut at = first;
        while let Some(node) = self.node(at).filter(|_| at != ROOT) {
            if !node.dollar {
                return true;
            }
            at = node.next;
        }
        false
    }
}
