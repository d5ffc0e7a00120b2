//! The `section!` macro and what it is made of.
//!
//! A section is written down once: its keys, their types, defaults and documentation. From that come
//! the struct, the reading with all faults collected, the unknown-key check, the documented default
//! file and the effective dump; none can drift from another.
//!
//! The expression behind a key's `=` says what kind of key it is ([`Field`] has one implementation
//! for each): `"30s"` a default as text, [`Within`] a default and bounds, [`Unset`] no default,
//! [`Computed`] a default made at start-up, [`Nested`] a table, [`Flat`] keys that
//! several tables have, [`Named`] a table of named tables, [`Listed`] a list of tables.

use std::collections::BTreeMap;
use std::convert::identity;
use std::ops::{Bound, RangeBounds};

use figment::value::{Dict, Value};

use super::layers::{Layers, Sources};
use super::names::is_name;
use super::page::{Line, Page};
use super::reader::{Reader, Scope};
use super::value::{ConfigValue, Rejected, quote};

/// Declares a table of the configuration.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        pub struct $name:ident {
            $($(#[doc = $doc:literal])* $field:ident: $type:ty = $default:expr,)*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(#[doc = $doc])* pub $field: $type,)*
        }

        impl $crate::config::schema::Section for $name {
            fn keys() -> Vec<&'static str> {
                let mut keys = Vec::new();
                $(keys.extend(<$type as $crate::config::schema::Field<_>>::keys(
                    &$default,
                    $crate::config::schema::name(stringify!($field)),
                ));)*
                keys
            }

            fn read_known(
                reader: &mut $crate::config::reader::Reader<'_>,
                scope: &$crate::config::reader::Scope<'_>,
            ) -> Self {
                $name {
                    $($field: $crate::config::schema::Field::read(reader, scope, $crate::config::schema::name(stringify!($field)), $default),)*
                }
            }

            fn write(&self, page: &mut $crate::config::page::Page) {
                $($crate::config::schema::Field::write(
                    &self.$field,
                    &$default,
                    $crate::config::schema::name(stringify!($field)),
                    concat!($($doc, "\n"),*),
                    page,
                );)*
            }
        }
    };
}
pub(crate) use section;

/// A field's name without what Rust needs in front of its own words.
pub(crate) fn name(field: &'static str) -> &'static str {
    field.strip_prefix("r#").unwrap_or(field)
}

/// A table of the configuration. Implemented by `section!` only.
pub(crate) trait Section: Sized {
    /// The keys, in the order they are documented.
    fn keys() -> Vec<&'static str>;

    /// Reads the table. A value that is at fault is replaced by its default, so that the checks
    /// behind can still look at the rest; the fault itself stops the start-up.
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>) -> Self {
        reader.refuse_unknown(scope, &Self::keys());
        Self::read_known(reader, scope)
    }

    /// Reads the keys there are, whatever others the table has.
    fn read_known(reader: &mut Reader<'_>, scope: &Scope<'_>) -> Self;

    /// Adds the keys to `page`, and the tables below it.
    fn write(&self, page: &mut Page);
}

/// A key whose kind is told by `D`, the type of its default.
pub(crate) trait Field<D>: Sized {
    /// What it adds to the keys of its table.
    fn keys(_: &D, key: &'static str) -> Vec<&'static str> {
        vec![key]
    }

    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, default: D) -> Self;

    fn write(&self, default: &D, key: &'static str, doc: &'static str, page: &mut Page);
}

/// The value of a default that is part of the program.
fn built_in<T: ConfigValue>(key: &str, text: &str) -> T {
    // Defaults are constants and every one is read by the test that loads no configuration at all.
    #[allow(clippy::panic)]
    T::from_text(text)
        .unwrap_or_else(|rejected| panic!("default of {key} is not {}", rejected.allowed))
}

fn line<T: ConfigValue>(value: &T, key: &'static str, doc: &'static str) -> Line {
    Line {
        key,
        doc,
        toml: Some(value.to_toml()),
        text: value.to_text(),
        example: None,
        secret: T::SECRET,
    }
}

/// A value with a default, given as the text an environment variable would hold.
impl<T: ConfigValue> Field<&'static str> for T {
    fn read(
        reader: &mut Reader<'_>,
        scope: &Scope<'_>,
        key: &'static str,
        default: &'static str,
    ) -> T {
        reader
            .value(scope, key, identity)
            .unwrap_or_else(|| built_in(key, default))
    }

    fn write(&self, _: &&'static str, key: &'static str, doc: &'static str, page: &mut Page) {
        page.lines.push(line(self, key, doc));
    }
}

/// A value with a default, and the bounds it must keep to.
pub(crate) struct Within<R>(pub &'static str, pub R);

impl<T: ConfigValue + PartialOrd, R: RangeBounds<T>> Field<Within<R>> for T {
    fn read(
        reader: &mut Reader<'_>,
        scope: &Scope<'_>,
        key: &'static str,
        default: Within<R>,
    ) -> T {
        let Within(text, bounds) = default;
        let allowed = || format!("{}, {}", T::allowed(), describe(&bounds));
        reader
            .value(scope, key, |value| match value {
                Ok(value) if bounds.contains(&value) => Ok(value),
                Ok(_) => Err(Rejected::new(allowed())),
                Err(rejected) => Err(Rejected {
                    allowed: allowed(),
                    ..rejected
                }),
            })
            .unwrap_or_else(|| built_in(key, text))
    }

    fn write(&self, _: &Within<R>, key: &'static str, doc: &'static str, page: &mut Page) {
        page.lines.push(line(self, key, doc));
    }
}

fn describe<T: ConfigValue>(bounds: &impl RangeBounds<T>) -> String {
    let text = |bound: Bound<&T>| match bound {
        Bound::Included(limit) | Bound::Excluded(limit) => Some(limit.to_text()),
        Bound::Unbounded => None,
    };
    match (text(bounds.start_bound()), text(bounds.end_bound())) {
        (Some(least), Some(most)) => format!("from {least} to {most}"),
        (Some(least), None) => format!("at least {least}"),
        (None, Some(most)) => format!("at most {most}"),
        (None, None) => "without bounds".to_owned(),
    }
}

/// A value that may be left out. Holds an example.
pub(crate) struct Unset(pub &'static str);

impl<T: ConfigValue> Field<Unset> for Option<T> {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, _: Unset) -> Option<T> {
        reader.value(scope, key, identity)
    }

    fn write(&self, example: &Unset, key: &'static str, doc: &'static str, page: &mut Page) {
        page.lines.push(Line {
            key,
            doc,
            toml: self.as_ref().map(T::to_toml),
            text: example.0.to_owned(),
            example: Some(quote(example.0)),
            secret: T::SECRET,
        });
    }
}

/// A value whose default is made at start-up. Holds what the default file shows in its place.
pub(crate) struct Computed(pub fn() -> String, pub &'static str);

impl<T: ConfigValue> Field<Computed> for T {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, default: Computed) -> T {
        reader
            .value(scope, key, identity)
            .or_else(|| T::from_text(&(default.0)()).ok())
            .unwrap_or_else(|| built_in(key, default.1))
    }

    fn write(&self, default: &Computed, key: &'static str, doc: &'static str, page: &mut Page) {
        page.lines.push(Line {
            text: default.1.to_owned(),
            example: Some(quote(default.1)),
            ..line(self, key, doc)
        });
    }
}

/// A table.
pub(crate) struct Nested;

impl<T: Section> Field<Nested> for T {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, _: Nested) -> T {
        let table = reader.table(scope, key, &T::keys());
        T::read(reader, &table)
    }

    fn write(&self, _: &Nested, key: &'static str, doc: &'static str, page: &mut Page) {
        let mut nested = page.below(key, doc);
        Section::write(self, &mut nested);
        page.pages.push(nested);
    }
}

/// Keys that several tables have: a section whose keys are among those of the table it is in.
pub(crate) struct Flat;

impl<T: Section> Field<Flat> for T {
    fn keys(_: &Flat, _: &'static str) -> Vec<&'static str> {
        T::keys()
    }

    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, _: &'static str, _: Flat) -> T {
        T::read_known(reader, scope)
    }

    fn write(&self, _: &Flat, _: &'static str, _: &'static str, page: &mut Page) {
        Section::write(self, page);
    }
}

/// A table of tables that the user names.
pub(crate) struct Named {
    /// The key that every one must have, for it has no sensible default.
    pub required: &'static str,
    /// The one whose name is enough: it may leave out the required key, and the default file shows
    /// it as an example where there is none.
    pub optional_for: Option<&'static str>,
    /// The one that is there when nothing at all is configured in the table around this one.
    pub built_in: Option<&'static str>,
    /// A name that is taken, and what it stands for.
    pub reserved: Option<(&'static str, &'static str)>,
}

impl<T: Section> Field<Named> for BTreeMap<String, T> {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, rules: Named) -> Self {
        let all = reader.table(scope, key, &["NAME"]);
        let mut named = BTreeMap::new();
        for (name, value) in all.entries() {
            if !is_name(name) {
                reader.refuse_name(&all, name, value);
                continue;
            }
            if let Some((_, stands_for)) = rules.reserved.filter(|(reserved, _)| reserved == name) {
                let problem =
                    format!("the name \"{name}\" stands for {stands_for}; allowed: another name");
                reader.fault(value, all.path_of(name), problem);
                continue;
            }
            let table = reader.table(&all, name, &T::keys());
            if rules.optional_for != Some(name) {
                reader.require(&table, rules.required, value);
            }
            named.insert(name.clone(), T::read(reader, &table));
        }
        let alone = scope.entries().all(|(other, _)| other == key) && named.is_empty();
        if let Some(name) = rules.built_in.filter(|_| alone) {
            named.insert(
                name.to_owned(),
                T::read(reader, &Scope::empty(all.path_of(name))),
            );
        }
        named
    }

    fn write(&self, rules: &Named, key: &'static str, doc: &'static str, page: &mut Page) {
        let mut all = page.below(key, doc);
        let mut add = |name: &str, section: &T, is_example: bool| {
            let mut one = Page {
                is_example,
                ..all.below(name, "")
            };
            section.write(&mut one);
            all.pages.push(one);
        };
        for (name, section) in self {
            add(name, section, false);
        }
        if let Some(name) = rules.optional_for.filter(|_| self.is_empty()) {
            add(name, &unconfigured(), true);
        }
        page.pages.push(all);
    }
}

/// A list of tables, whose order counts: `[[key]]` in TOML. The layers number them from 1, so that a
/// variable can name one (`EXPROTO_AUTHENTICATION__1__URL`, as EMQX counts); here their numbers order them.
pub(crate) struct Listed;

/// An item of a list, whose keys depend on what it is.
pub(crate) trait Item: Sized {
    /// Reads the table. None where it cannot be told what it is; that is noted as a fault. `value` is
    /// the table itself, for faults about what is missing from it.
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, value: &Value) -> Option<Self>;

    /// Adds the keys to `page`, and the tables below it.
    fn write(&self, page: &mut Page);

    /// What the default file shows, commented out: one of each sort.
    fn examples() -> Vec<(&'static str, Self)>;
}

impl<T: Item> Field<Listed> for BTreeMap<u16, T> {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, key: &'static str, _: Listed) -> Self {
        if scope.is_empty_list(key) {
            return BTreeMap::new();
        }
        let all = reader.table(scope, key, &["1", "2", "..."]);
        let mut items = BTreeMap::new();
        // `[key]` in place of `[[key]]`.
        let is_of_an_item = |(name, value): &(&String, &Value)| {
            value.as_dict().is_none() && name.parse::<u16>().is_err()
        };
        if let Some((name, value)) = all.entries().find(is_of_an_item) {
            reader.refuse_table(&all, name, value);
            return items;
        }
        for (number, value) in all.entries() {
            match number.parse::<u16>() {
                Ok(place) if place > 0 => {
                    let table = reader.table(&all, number, &["..."]);
                    if let Some(item) = T::read(reader, &table, value) {
                        items.insert(place, item);
                    }
                }
                _ => reader.refuse_number(&all, number, value),
            }
        }
        items
    }

    fn write(&self, _: &Listed, key: &'static str, doc: &'static str, page: &mut Page) {
        let mut all = page.below(key, doc);
        for (number, item) in self {
            let mut one = all.item(usize::from(*number));
            item.write(&mut one);
            all.pages.push(one);
        }
        let examples = if self.is_empty() {
            T::examples()
        } else {
            Vec::new()
        };
        for (index, (doc, item)) in examples.iter().enumerate() {
            let mut one = Page {
                doc,
                is_example: true,
                ..all.item(index + 1)
            };
            item.write(&mut one);
            all.pages.push(one);
        }
        page.pages.push(all);
    }
}

/// A section as it is when nothing of it is configured: an example.
pub(crate) fn unconfigured<T: Section>() -> T {
    let layers = Layers::merge(&Sources::default(), &mut Vec::new());
    T::read(&mut Reader::new(&layers, &[]), &Scope::empty(String::new()))
}

/// `path.key`, or `key` at the top level.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Every value below `table` that is not itself a table.
pub(crate) fn leaves(table: &Dict) -> Vec<&Value> {
    let mut found = Vec::new();
    for value in table.values() {
        match value.as_dict() {
            Some(below) if !below.is_empty() => found.extend(leaves(below)),
            _ => found.push(value),
        }
    }
    found
}
