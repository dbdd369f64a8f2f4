//! One printed thing: a kind and named fields in a fixed order.

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;
use std::fmt;

/// A printed structure or item. As JSON it is an object whose `record` field is
/// its kind; as text a line, with its greater parts on lines of their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    kind: &'static str,
    indent: usize,
    fields: Vec<(&'static str, Value)>,
}

impl Record {
    /// A record without fields, `indent` steps in as text.
    pub(super) fn new(kind: &'static str, indent: usize) -> Self {
        Self {
            kind,
            indent,
            fields: Vec::new(),
        }
    }

    /// Adds a field.
    #[must_use]
    pub(super) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    /// What it is, for example `super`, `btree_block` or `item`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// A field by its name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.fields.len() + 1))?;
        map.serialize_entry("record", self.kind)?;
        for (name, value) in &self.fields {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Elements of an array printed on one line.
const PER_LINE: usize = 8;

fn is_flat(value: &Value) -> bool {
    !value.is_array() && !value.is_object()
}

/// A value on one line.
fn write_flat(f: &mut fmt::Formatter<'_>, value: &Value) -> fmt::Result {
    match value {
        Value::String(text) => f.write_str(text),
        Value::Object(map) => {
            // What it is comes first, the rest in the order of names.
            let kind = map.get("kind");
            if let Some(kind) = kind {
                write_flat(f, kind)?;
            }
            let rest = map.iter().filter(|(name, _)| *name != "kind");
            for (i, (name, value)) in rest.enumerate() {
                let first = i == 0 && kind.is_none();
                write!(f, "{}{name} ", if first { "" } else { " " })?;
                write_flat(f, value)?;
            }
            Ok(())
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                f.write_str(if i > 0 { "," } else { "" })?;
                write_flat(f, item)?;
            }
            Ok(())
        }
        other => write!(f, "{other}"),
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pad = "  ".repeat(self.indent);
        write!(f, "{pad}{}", self.kind)?;
        for (name, value) in self.fields.iter().filter(|(_, v)| is_flat(v)) {
            write!(f, " {name} ")?;
            write_flat(f, value)?;
        }
        for (name, value) in self.fields.iter().filter(|(_, v)| !is_flat(v)) {
            match value {
                Value::Array(items) => {
                    let step = if items.iter().all(is_flat) {
                        PER_LINE
                    } else {
                        1
                    };
                    for line in items.chunks(step) {
                        write!(f, "\n{pad}  {name}:")?;
                        for item in line {
                            f.write_str(" ")?;
                            write_flat(f, item)?;
                        }
                    }
                }
                other => {
                    write!(f, "\n{pad}  {name}: ")?;
                    write_flat(f, other)?;
                }
            }
        }
        Ok(())
    }
}
