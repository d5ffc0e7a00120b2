//! A map from topic filters to values that finds the filters of a topic.
//!
//! A tree with one node for each level of a filter. Matching walks the topic's
//! levels and at each looks into at most three children: the level itself, `+` and
//! `#`. What does not match is never touched, however much of it there is.
//!
//! The children of one node are linked to each other; where they are more than a
//! few, they are found in one hash map for the whole tree, by parent and level. A
//! level's text is kept once, however many filters use it. So what a million device
//! topics have in common costs nothing, and a step costs as much whether a node has
//! ten children or a million. Nodes live in one vector and are linked by index,
//! which keeps those of one filter close together; empty ones are used again.

mod relate;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use super::topic::TopicFilter;

/// The root's index; as a child or sibling it means none, for the root is neither.
const ROOT: u32 = 0;

/// The two wildcards are levels like others, with ids that are always theirs.
const PLUS: u32 = 0;
const HASH: u32 = 1;

/// So many children are looked through one by one: it saves the map, and its misses
/// of the cache, for nearly all nodes.
const FEW: usize = 4;

type Children = HashMap<(u32, u32), u32, Mixer>;

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
    /// The children that are no wildcards are in the map too.
    mapped: bool,
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
    children: Children,
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
            mapped: false,
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
            let (plus, hash) = (node.plus, node.hash);
            let level = scratch.levels.get(depth).copied();
            let child = level
                .flatten()
                .map(|level| child_of(nodes, children, at, level));
            let is_wild = depth >= wild_from;
            if is_wild && hash != ROOT {
                found_at(nodes, hash);
            }
            if level.is_none() {
                found_at(nodes, at);
                continue;
            }
            let next = [plus * u32::from(is_wild), child.unwrap_or(ROOT)];
            let next = next.into_iter().filter(|at| *at != ROOT);
            scratch.stack.extend(next.map(|at| (at, depth + 1)));
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
            text => child_of(&self.nodes, &self.children, at, self.levels.get(text)?.id),
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
                if self.nodes.len() == self.nodes.capacity() {
                    // A vector doubles by itself: at a million filters that is too much.
                    self.nodes.reserve_exact(self.nodes.len() / 4 + 16);
                }
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
                let first = self.node(parent).map_or(ROOT, |node| node.first_child);
                self.change(parent, |node| node.first_child = at);
                self.change(at, |node| node.next = first);
                if first != ROOT {
                    self.change(first, |node| node.previous = at);
                }
                self.map_children(parent, (level, at));
            }
        }
        at
    }

    /// Puts a new child into the map, if the parent's are there or have become many.
    fn map_children(&mut self, parent: u32, (level, at): (u32, u32)) {
        let Some(node) = self.node(parent) else {
            return;
        };
        if node.mapped {
            self.children.insert((parent, level), at);
            return;
        }
        let first = self.node(node.first_child);
        let siblings = std::iter::successors(first, |child| {
            self.node(child.next).filter(|_| child.next != ROOT)
        });
        if siblings.count() <= FEW {
            return;
        }
        let mut at = node.first_child;
        while let Some(child) = self.node(at).filter(|_| at != ROOT) {
            let (level, next) = (child.level, child.next);
            self.children.insert((parent, level), at);
            at = next;
        }
        self.change(parent, |node| node.mapped = true);
    }

    /// Takes an empty node out.
    fn prune(&mut self, at: u32, text: &str) {
        let Some(node) = self.node(at) else { return };
        let (parent, level, previous, next) = (node.parent, node.level, node.previous, node.next);
        match level {
            PLUS => self.change(parent, |node| node.plus = ROOT),
            HASH => self.change(parent, |node| node.hash = ROOT),
            level => {
                if self.node(parent).is_some_and(|node| node.mapped) {
                    self.children.remove(&(parent, level));
                }
                if previous == ROOT {
                    self.change(parent, |node| {
                        node.first_child = next;
                        // The last one: they may be few again.
                        node.mapped &= next != ROOT;
                    });
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

/// The child with this level, or [`ROOT`] if there is none.
fn child_of<V>(nodes: &[Node<V>], children: &Children, at: u32, level: u32) -> u32 {
    let Some(node) = nodes.get(at as usize) else {
        return ROOT;
    };
    if node.mapped {
        return children.get(&(at, level)).copied().unwrap_or(ROOT);
    }
    let mut at = node.first_child;
    while at != ROOT
        && let Some(child) = nodes.get(at as usize)
    {
        if child.level == level {
            return at;
        }
        at = child.next;
    }
    ROOT
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
