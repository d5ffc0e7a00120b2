//! Which pool member holds which filter where messages bear no subscription
//! identifiers (MQTT 3.1.1).
//!
//! A message that matches two filters of one client comes once or twice, as the
//! broker likes, and does not say for which. So no two filters that a member has at
//! the broker may overlap: then each message comes to a member once, and the
//! member's own table says whom it is for.
//!
//! ```text
//! subscribed here  a/b  a/+  a/#      $share/g/a/b
//! member 0         a/b -- first come
//! member 1              a/+ -- overlaps a/b; a/c would be covered and cost nothing
//! member 2                   a/#      (overlaps a/+ too)
//! member 3                            $share/g/a/b
//! ```
//!
//! Pure: no IO; the caller does what an [`Assignment`] says.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::topic::TopicFilter;
use super::trie::Trie;

/// Where a filter lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The pool member.
    pub member: usize,
    /// What the member subscribes at the broker: the filter or one that covers it.
    pub held: TopicFilter,
}

/// No member can take the filter: it overlaps with what each of them holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoom;

/// A filter that a member holds at the broker.
#[derive(Debug)]
struct Held {
    filter: TopicFilter,
    /// Filters that rely on it.
    reliant: usize,
}

#[derive(Debug)]
struct Owner {
    assignment: Assignment,
    subscribers: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Planner {
    /// What each member holds. There are as many as may ever be opened.
    members: Vec<Trie<Held>>,
    /// Members that filters are spread over.
    spread: usize,
    /// Members in use; those beyond `spread` were opened for what overlaps.
    open: usize,
    owners: HashMap<Arc<str>, Owner>,
    hasher: RandomState,
}

impl Planner {
    /// Filters are spread over `spread` members, at least one; for those that
    /// overlap members are opened, up to `most` in all.
    pub fn new(spread: usize, most: usize) -> Self {
        let spread = spread.max(1);
        let members = std::iter::repeat_with(Trie::default);
        Self {
            members: members.take(most.max(spread)).collect(),
            spread,
            open: spread,
            owners: HashMap::new(),
            hasher: RandomState::new(),
        }
    }

    /// Members in use.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Adds a subscriber of a filter. Each is to be taken back by
    /// [`Planner::remove`].
    ///
    /// # Errors
    /// [`NoRoom`]; nothing has changed then.
    pub fn add(&mut self, filter: &TopicFilter) -> Result<Assignment, NoRoom> {
        if let Some(owner) = self.owners.get_mut(filter.as_str()) {
            owner.subscribers += 1;
            return Ok(owner.assignment.clone());
        }
        let assignment = match self.covered(filter) {
            Some(assignment) => assignment,
            None => self.place(filter)?,
        };
        if let Some(held) = self.held(&assignment) {
            held.reliant += 1;
        }
        let owner = Owner {
            assignment: assignment.clone(),
            subscribers: 1,
        };
        self.owners.insert(filter.as_str().into(), owner);
        Ok(assignment)
    }

    /// Takes a subscriber of a filter away. What is to be unsubscribed at the
    /// broker, if nothing relies on it any more.
    pub fn remove(&mut self, filter: &TopicFilter) -> Option<Assignment> {
        let owner = self.owners.get_mut(filter.as_str())?;
        owner.subscribers -= 1;
        if owner.subscribers > 0 {
            return None;
        }
        let assignment = self.owners.remove(filter.as_str())?.assignment;
        let held = self.held(&assignment)?;
        held.reliant -= 1;
        if held.reliant > 0 {
            return None;
        }
        let member = self.members.get_mut(assignment.member)?;
        member.remove(&assignment.held)?;
        Some(assignment)
    }

    fn held(&mut self, assignment: &Assignment) -> Option<&mut Held> {
        let member = self.members.get_mut(assignment.member)?;
        member.get_mut(&assignment.held)
    }

    /// A member that gets all of the filter's messages already. The group of a
    /// shared subscription gets its own ones only, so nothing covers it.
    fn covered(&self, filter: &TopicFilter) -> Option<Assignment> {
        if filter.is_shared() {
            return None;
        }
        let mut members = self.members.iter().take(self.open).enumerate();
        members.find_map(|(member, holds)| {
            let held = holds.covering(filter, |held| !held.filter.is_shared())?;
            Some(Assignment {
                member,
                held: held.filter.clone(),
            })
        })
    }

    /// Gives the filter to a member that holds nothing like it.
    fn place(&mut self, filter: &TopicFilter) -> Result<Assignment, NoRoom> {
        let spread = self.spread as u64;
        let hash = self.hasher.hash_one(filter.as_str());
        // Below the number of members, which is a usize.
        let first = usize::try_from(hash % spread).unwrap_or(0);
        let spread = (first..self.spread).chain(0..first);
        // One more than are open, if there may be: it holds nothing yet.
        let candidates = spread.chain(self.spread..self.members.len().min(self.open + 1));
        for member in candidates {
            let Some(holds) = self.members.get_mut(member) else {
                continue;
            };
            if !holds.overlaps(filter) {
                let held = Held {
                    filter: filter.clone(),
                    reliant: 0,
                };
                holds.insert(filter, held);
                self.open = self.open.max(member + 1);
                return Ok(Assignment {
                    member,
                    held: filter.clone(),
                });
            }
        }
        Err(NoRoom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::parse(text).unwrap()
    }

    fn add(planner: &mut Planner, text: &str) -> (usize, String) {
        let assignment = planner.add(&filter(text)).unwrap();
        (assignment.member, assignment.held.to_string())
    }

    #[test]
    fn what_is_covered_costs_nothing_and_what_overlaps_gets_a_member() {
        let mut planner = Planner::new(1, 4);
        assert_eq!(add(&mut planner, "a/b"), (0, "a/b".into()));
        assert_eq!(add(&mut planner, "a/+"), (1, "a/+".into()));
        assert_eq!(add(&mut planner, "a/c"), (1, "a/+".into()));
        assert_eq!(add(&mut planner, "a/b"), (0, "a/b".into()));
        assert_eq!(add(&mut planner, "a/#"), (2, "a/#".into()));
        assert_eq!(add(&mut planner, "b"), (0, "b".into()));
        assert_eq!(planner.open(), 3);
    }

    #[test]
    fn what_is_held_stays_while_a_filter_relies_on_it() {
        let mut planner = Planner::new(1, 2);
        add(&mut planner, "a/#");
        add(&mut planner, "a/b");
        add(&mut planner, "a/b");
        assert_eq!(planner.remove(&filter("a/#")), None);
        assert_eq!(planner.remove(&filter("a/b")), None);
        let gone = planner.remove(&filter("a/b")).unwrap();
        assert_eq!((gone.member, gone.held.as_str()), (0, "a/#"));
        assert_eq!(planner.remove(&filter("a/b")), None);
        assert!(planner.owners.is_empty());
    }

    #[test]
    fn a_shared_subscription_is_covered_by_itself_alone() {
        let mut planner = Planner::new(1, 4);
        assert_eq!(add(&mut planner, "#").0, 0);
        assert_eq!(add(&mut planner, "$share/g/a"), (1, "$share/g/a".into()));
        assert_eq!(add(&mut planner, "$share/g/a"), (1, "$share/g/a".into()));
        assert_eq!(add(&mut planner, "$share/h/a"), (2, "$share/h/a".into()));
        assert_eq!(add(&mut planner, "a"), (0, "#".into()));
        let mut planner = Planner::new(1, 4);
        add(&mut planner, "$share/g/a");
        assert_eq!(add(&mut planner, "a"), (1, "a".into()));
    }

    #[test]
    fn when_every_member_overlaps_the_filter_is_refused() {
        let mut planner = Planner::new(1, 2);
        add(&mut planner, "a/+");
        add(&mut planner, "+/b");
        assert_eq!(planner.add(&filter("a/#")), Err(NoRoom));
        assert_eq!(add(&mut planner, "c"), (0, "c".into()));
        planner.remove(&filter("+/b"));
        assert_eq!(add(&mut planner, "a/#"), (1, "a/#".into()));
    }

    fn some_filter() -> impl Strategy<Value = TopicFilter> {
        let level = prop::sample::select(vec!["a", "b", "$x", "+"]);
        let share = prop::sample::select(vec!["", "", "", "$share/g/", "$share/h/"]);
        (share, prop::collection::vec(level, 0..4), any::<bool>())
            .prop_map(|(share, mut levels, hash)| {
                if hash {
                    levels.push("#");
                }
                format!("{share}{}", levels.join("/"))
            })
            .prop_filter_map("not empty", |text| TopicFilter::parse(&text).ok())
    }

    /// Topics of up to four levels.
    fn topics() -> Vec<String> {
        let levels = ["a", "b", "$x", "z"];
        let mut all = Vec::new();
        let mut longest: Vec<String> = levels.map(str::to_owned).to_vec();
        for _ in 0..4 {
            all.extend(longest.iter().cloned());
            let longer = |t: &String| levels.map(|l| format!("{t}/{l}"));
            longest = longest.iter().flat_map(longer).collect();
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// At all times: a topic matches at most one filter that a member holds, and
        /// whatever matches a filter comes to its member.
        #[test]
        fn each_message_comes_to_a_member_once(
            steps in prop::collection::vec((some_filter(), any::<prop::sample::Index>(), 0..3), 1..30),
        ) {
            let topics = topics();
            let mut planner = Planner::new(2, 8);
            let mut subscribed: Vec<TopicFilter> = Vec::new();
            // The broker's own view, made of what it is told.
            let mut held: HashMap<(usize, TopicFilter), ()> = HashMap::new();
            for (filter, index, step) in steps {
                if step > 0 || subscribed.is_empty() {
                    if let Ok(assignment) = planner.add(&filter) {
                        held.insert((assignment.member, assignment.held), ());
                        subscribed.push(filter);
                    }
                } else {
                    let leaving = subscribed.swap_remove(index.index(subscribed.len()));
                    if let Some(gone) = planner.remove(&leaving) {
                        prop_assert!(held.remove(&(gone.member, gone.held)).is_some());
                    }
                }
                for member in 0..planner.open() {
                    let its: Vec<_> = held.keys().filter(|(m, _)| *m == member).collect();
                    for topic in &topics {
                        let copies = its.iter().filter(|(_, f)| f.matches(topic)).count();
                        prop_assert!(copies <= 1, "{topic} twice at {member}: {its:?}");
                    }
                }
                for filter in &subscribed {
                    let owner = &planner.owners[filter.as_str()].assignment;
                    prop_assert!(held.contains_key(&(owner.member, owner.held.clone())));
                    prop_assert_eq!(filter.is_shared(), owner.held.is_shared());
                    let covers = |t: &&String| !filter.matches(t) || owner.held.matches(t);
                    prop_assert!(topics.iter().all(|t| covers(&t)));
                }
            }
            for filter in subscribed {
                if let Some(gone) = planner.remove(&filter) {
                    held.remove(&(gone.member, gone.held));
                }
            }
            prop_assert!(held.is_empty() && planner.owners.is_empty());
            prop_assert!(planner.members.iter().all(Trie::is_empty));
        }
    }
}
