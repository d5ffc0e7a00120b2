//! A map from topic filters to values that finds the filters of a topic.
//!
//! A tree with one node for each level of a filter. Matching walks the topic's
//! levels and at each looks into at most three children: the level itself, `+` and
//! `#`. What does not match is never touched, however much of it there is.
//!
//! Children are found in one hash map for the whole tree, by parent and level, and
//! a level's text is kept once, however many filters use it: what a million device
//! topics have in common costs nothing, and a step costs two look-ups whether a
//! node has two children or a million. Nodes live in one vector and are linked by
//! index; those that become empty are used again.

mod relate;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use super::topic::TopicFilter;

/// The root's index; as a child or sibling it means none, for the root is neither.
const ROOT: u32 = 0;

/// The two wildcards are levels like others, with ids that are always theirs.
const PLUS: u32 = 0;
const HASH: u32 = 1;

#[derive(Debug)]
struct Node<V> {
    parent: u32,
    level: u32,
    /// The first of the children that are no wildcards; they are linked to each other.
    first_child: u32,
    previous: u32,
    next: u32,
    /// The children `+` and `#`.
    plus: u32,
    hash: u32,
    /// The level begins with `$`; only looked at below the root.
    dollar: bool,
    value: Option<V>,
}

#[derive(Debug)]
struct Level {
    id: u32,
    /// Nodes with this level.
    uses: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Trie<V> {
    nodes: Vec<Node<V>>,
    /// Indices of nodes that are not in use.
    free_nodes: Vec<u32>,
    children: HashMap<(u32, u32), u32, Mixer>,
    levels: HashMap<Box<str>, Level>,
    free_levels: Vec<u32>,
    next_level: u32,
    len: usize,
    /// Kept between matches, so that they allocate nothing.
    scratch: Scratch,
}

#[derive(Debug, Default)]
struct Scratch {
    levels: Vec<Option<u32>>,
    stack: Vec<(u32, usize)>,
}

impl<V> Default for Trie<V> {
    fn default() -> Self {
        Self {
            nodes: vec![Node::new(ROOT, HASH, false)],
            free_nodes: Vec::new(),
            children: HashMap::with_hasher(Mixer::new()),
            levels: HashMap::new(),
            free_levels: Vec::new(),
            next_level: HASH + 1,
            len: 0,
            scratch: Scratch::default(),
        }
    }
}

impl<V> Node<V> {
    fn new(parent: u32, level: u32, dollar: bool) -> Self {
        Self {
            parent,
            level,
            first_child: ROOT,
            previous: ROOT,
            next: ROOT,
            plus: ROOT,
            hash: ROOT,
            dollar,
            value: None,
        }
    }
}

impl<V> Trie<V> {
    /// Number of filters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no filter.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a value at a filter and gives back the one that was there. A shared
    /// subscription is at the filter behind its group.
    pub fn insert(&mut self, filter: &TopicFilter, value: V) -> Option<V> {
        let mut at = ROOT;
        for (depth, level) in filter.filter().split('/').enumerate() {
            let dollar = depth == 0 && level.starts_with('$');
            at = match self.find_child(at, level) {
                Some(child) => child,
                None => self.grow(at, level, dollar),
            };
        }
        let old = self.nodes.get_mut(at as usize)?.value.replace(value);
        self.len += usize::from(old.is_none());
        old
    }

    /// The value at exactly this filter.
    pub fn get(&self, filter: &TopicFilter) -> Option<&V> {
        self.node(self.find(filter)?)?.value.as_ref()
    }

    /// The value at exactly this filter, to be changed.
    pub fn get_mut(&mut self, filter: &TopicFilter) -> Option<&mut V> {
        let at = self.find(filter)?;
        self.nodes.get_mut(at as usize)?.value.as_mut()
    }

    /// Takes a filter out.
    pub fn remove(&mut self, filter: &TopicFilter) -> Option<V> {
        let mut at = self.find(filter)?;
        let value = self.nodes.get_mut(at as usize)?.value.take()?;
        self.len -= 1;
        for level in filter.filter().rsplit('/') {
            let Some(node) = self.node(at) else { break };
            let is_parent = [node.first_child, node.plus, node.hash] != [ROOT; 3];
            if node.value.is_some() || is_parent {
                break;
            }
            let parent = node.parent;
            self.prune(at, level);
            at = parent;
        }
        Some(value)
    }

    /// Calls `found` with the value of each filter that a topic matches, in no
    /// particular order (MQTT 5, 4.7).
    pub fn matches(&mut self, topic: &str, mut found: impl FnMut(&mut V)) {
        let Self {
            nodes,
            children,
            levels,
            scratch,
            ..
        } = self;
        let mut found_at = |nodes: &mut Vec<Node<V>>, at: u32| {
            if let Some(value) = nodes.get_mut(at as usize).and_then(|n| n.value.as_mut()) {
                found(value);
            }
        };
        scratch.levels.clear();
        // A level that no filter names can only meet a wildcard.
        let ids = topic.split('/').map(|text| levels.get(text).map(|l| l.id));
        scratch.levels.extend(ids);
        // A wildcard in the first level does not match `$` (4.7.2).
        let wild_from = usize::from(topic.starts_with('$'));
        scratch.stack.clear();
        scratch.stack.push((ROOT, 0));
        while let Some((at, depth)) = scratch.stack.pop() {
            let Some(node) = nodes.get(at as usize) else {
                continue;
            };
            let (plus, hash, is_leaf) = (node.plus, node.hash, node.first_child == ROOT);
            let is_wild = depth >= wild_from;
            if is_wild && hash != ROOT {
                found_at(nodes, hash);
            }
            let Some(level) = scratch.levels.get(depth) else {
                found_at(nodes, at);
                continue;
            };
            if is_wild && plus != ROOT {
                scratch.stack.push((plus, depth + 1));
            }
            if let Some(level) = level
                && !is_leaf
                && let Some(child) = children.get(&(at, *level))
            {
                scratch.stack.push((*child, depth + 1));
            }
        }
    }

    fn node(&self, at: u32) -> Option<&Node<V>> {
        self.nodes.get(at as usize)
    }

    /// Changes a node; none but those in use are ever named.
    fn change(&mut self, at: u32, change: impl FnOnce(&mut Node<V>)) {
        if let Some(node) = self.nodes.get_mut(at as usize) {
            change(node);
        }
    }

    fn find_child(&self, at: u32, level: &str) -> Option<u32> {
        let child = match level {
            "+" => self.node(at)?.plus,
            "#" => self.node(at)?.hash,
            text => *self.children.get(&(at, self.levels.get(text)?.id))?,
        };
        (child != ROOT).then_some(child)
    }

    fn find(&self, filter: &TopicFilter) -> Option<u32> {
        let mut levels = filter.filter().split('/');
        levels.try_fold(ROOT, |at, level| self.find_child(at, level))
    }

    /// Makes the child that is not there yet.
    fn grow(&mut self, parent: u32, text: &str, dollar: bool) -> u32 {
        let level = match text {
            "+" => PLUS,
            "#" => HASH,
            text => self.use_level(text),
        };
        let node = Node::new(parent, level, dollar);
        let at = match self.free_nodes.pop() {
            Some(free) => free,
            None => {
                self.nodes.push(Node::new(ROOT, HASH, false));
                // Four thousand million nodes are more than any memory holds.
                u32::try_from(self.nodes.len() - 1).unwrap_or(ROOT)
            }
        };
        self.change(at, |slot| *slot = node);
        match level {
            PLUS => self.change(parent, |node| node.plus = at),
            HASH => self.change(parent, |node| node.hash = at),
            level => {
                self.children.insert((parent, level), at);
                let first = self.node(parent).map_or(ROOT, |node| node.first_child);
                self.change(parent, |node| node.first_child = at);
                self.change(at, |node| node.next = first);
                if first != ROOT {
                    self.change(first, |node| node.previous = at);
                }
            }
        }
        at
    }

    /// Takes an empty node out.
    fn prune(&mut self, at: u32, text: &str) {
        let Some(node) = self.node(at) else { return };
        let (parent, level, previous, next) = (node.parent, node.level, node.previous, node.next);
        match level {
            PLUS => self.change(parent, |node| node.plus = ROOT),
            HASH => self.change(parent, |node| node.hash = ROOT),
            level => {
                self.children.remove(&(parent, level));
                if previous == ROOT {
                    self.change(parent, |node| node.first_child = next);
                } else {
                    self.change(previous, |node| node.next = next);
                }
                if next != ROOT {
                    self.change(next, |node| node.previous = previous);
                }
                self.leave_level(text);
            }
        }
        self.free_nodes.push(at);
    }

    fn use_level(&mut self, text: &str) -> u32 {
        if let Some(level) = self.levels.get_mut(text) {
            level.uses += 1;
            return level.id;
        }
        let id = self.free_levels.pop().unwrap_or_else(|| {
            self.next_level += 1;
            self.next_level - 1
        });
        self.levels.insert(text.into(), Level { id, uses: 1 });
        id
    }

    fn leave_level(&mut self, text: &str) {
        if let Some(level) = self.levels.get_mut(text) {
            level.uses -= 1;
            if level.uses == 0 {
                self.free_levels.push(level.id);
                self.levels.remove(text);
            }
        }
    }
}

/// Hashes the two indices that name a child. They are ours and not a peer's, so one
/// multiplication and a random start are enough; a peer's texts are hashed by the
/// standard library's hasher.
#[derive(Debug, Clone)]
struct Mixer {
    seed: u64,
}

impl Mixer {
    fn new() -> Self {
        Self {
            seed: RandomState::new().hash_one(0),
        }
    }
}

impl BuildHasher for Mixer {
    type Hasher = Mixing;

    fn build_hasher(&self) -> Mixing {
        Mixing(self.seed)
    }
}

struct Mixing(u64);

impl Hasher for Mixing {
    fn write_u32(&mut self, number: u32) {
        self.0 = self.0.rotate_left(32) ^ u64::from(number);
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((*byte).into());
        }
    }

    fn finish(&self) -> u64 {
        // The golden ratio's bits; both halves of the product go in.
        let product = u128::from(self.0) * 0x9E37_79B9_7F4A_7C15;
        #[allow(clippy::cast_possible_truncation)]
        let folded = (product >> 64) as u64 ^ product as u64;
        folded
    }
}

#[cfg(test)]
mod tests;
