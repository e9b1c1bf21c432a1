//! Manifests of Services and their EndpointSlices, written as tests need them.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::daemon::NODE_NAME;
use crate::lab::{Family, Host, Lab};
use crate::traffic::Protocol;

/// A Service in the namespace `shop` and all of its endpoints: one file.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The Service's name, and the file's.
    pub name: String,
    /// `spec.clusterIPs`.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<Port>,
    /// The annotation `portcullis.dev/allowed-source-cidrs`.
    pub allowed: Option<String>,
    /// The endpoints, in any family.
    pub endpoints: Vec<Endpoint>,
    /// Other annotations, and fields of `spec` and `status`: merged into the Service.
    pub extra: Value,
}

/// A Service port.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port at the Service's addresses.
    pub port: u16,
    /// The port at the node's addresses.
    pub node_port: Option<u16>,
    /// The port at the endpoints.
    pub target: u16,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// The node that it runs on.
    pub node: String,
    /// Whether it is ready.
    pub ready: bool,
    /// A port of its own instead of [`Port::target`], in a slice of its own.
    pub target: Option<u16>,
    /// Other fields of the endpoint: merged into it.
    pub extra: Value,
}

impl Endpoint {
    /// Both addresses of a pod on the laboratory's node.
    pub fn of(pod: &Host) -> [Endpoint; 2] {
        [Family::V4, Family::V6].map(|family| Endpoint {
            address: pod.address(family),
            node: NODE_NAME.into(),
            ready: true,
            target: None,
            extra: Value::Null,
        })
    }

    /// Both addresses of the pod on the other node.
    pub fn elsewhere(lab: &Lab) -> [Endpoint; 2] {
        Endpoint::of(&lab.remote_pod).map(|endpoint| Endpoint { node: "peer".into(), ..endpoint })
    }
}

impl Port {
    /// A port with a node port.
    pub fn new(name: &str, protocol: Protocol, port: u16, target: u16, node_port: u16) -> Port {
        Port { name: name.into(), protocol, port, node_port: Some(node_port), target }
    }
}

impl Manifest {
    /// A dual-stack Service `name` whose ClusterIPs end with `host` (`10.96.0.10` and
    /// `fd00:10:96::a` for 10), all pods of the laboratory as endpoints, and no ports yet.
    pub fn new(name: &str, host: u8, lab: &Lab) -> Manifest {
        Manifest {
            name: name.into(),
            cluster_ips: vec![
                IpAddr::from([10, 96, 0, host]),
                IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(host)]),
            ],
            ports: Vec::new(),
            allowed: None,
            endpoints: lab.pods.iter().flat_map(Endpoint::of).collect(),
            extra: Value::Null,
        }
    }

    /// Adds a port.
    #[must_use]
    pub fn port(mut self, port: Port) -> Manifest {
        self.ports.push(port);
        self
    }

    /// Sets the annotation.
    #[must_use]
    pub fn allowed(mut self, sources: &str) -> Manifest {
        self.allowed = Some(sources.into());
        self
    }

    /// Writes the file `NAME.json` into `directory`, in one step.
    pub fn write(&self, directory: &Path) -> Result<()> {
        replace(&directory.join(format!("{}.json", self.name)), &format!("{:#}", self.list()))
    }

    /// The objects, as a `List`.
    pub fn list(&self) -> Value {
        let mut items = vec![self.service()];
        let mut slices: BTreeMap<(bool, Option<u16>), Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in &self.endpoints {
            let key = (endpoint.address.is_ipv6(), endpoint.target);
            slices.entry(key).or_default().push(endpoint);
        }
        for (number, ((v6, target), endpoints)) in slices.into_iter().enumerate() {
            items.push(self.slice(number, v6, target, &endpoints));
        }
        json!({ "apiVersion": "v1", "kind": "List", "items": items })
    }

    fn service(&self) -> Value {
        let ports: Vec<Value> = self.ports.iter().map(Port::service_port).collect();
        let node_ports = self.ports.iter().any(|port| port.node_port.is_some());
        let mut service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name, "namespace": "shop" },
            "spec": {
                "type": if node_ports { "NodePort" } else { "ClusterIP" },
                "clusterIP": self.cluster_ips[0],
                "clusterIPs": self.cluster_ips,
                "ports": ports,
            },
        });
        if let Some(allowed) = &self.allowed {
            service["metadata"]["annotations"] =
                json!({ "portcullis.dev/allowed-source-cidrs": allowed });
        }
        merge(&mut service, &self.extra);
        service
    }

    fn slice(
        &self,
        number: usize,
        v6: bool,
        target: Option<u16>,
        endpoints: &[&Endpoint],
    ) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                json!({
                    "name": port.name,
                    "protocol": protocol_name(port.protocol),
                    "port": target.unwrap_or(port.target),
                })
            })
            .collect();
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|endpoint| {
                let mut object = json!({
                    "addresses": [endpoint.address],
                    "conditions": { "ready": endpoint.ready },
                    "nodeName": endpoint.node,
                });
                merge(&mut object, &endpoint.extra);
                object
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{number}", self.name),
                "namespace": "shop",
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

/// Puts the fields of `extra` into `object`, those of objects one by one.
fn merge(object: &mut Value, extra: &Value) {
    match (object, extra) {
        (_, Value::Null) => {}
        (Value::Object(fields), Value::Object(extra)) => {
            for (name, value) in extra {
                merge(fields.entry(name).or_insert(Value::Null), value);
            }
        }
        (object, extra) => *object = extra.clone(),
    }
}

impl Port {
    fn service_port(&self) -> Value {
        let mut port = json!({
            "name": self.name,
            "protocol": protocol_name(self.protocol),
            "port": self.port,
            "targetPort": self.target,
        });
        if let Some(node_port) = self.node_port {
            port["nodePort"] = node_port.into();
        }
        port
    }
}

/// Writes the Node object of the laboratory's node.
pub fn write_node(lab: &Lab, directory: &Path) -> Result<()> {
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": NODE_NAME, "labels": { "topology.kubernetes.io/zone": "here" } },
        "spec": { "podCIDRs": lab.pod_cidrs() },
        "status": { "addresses": [
            { "type": "InternalIP", "address": lab.node.v4 },
            { "type": "InternalIP", "address": lab.node.v6 },
        ] },
    });
    replace(&directory.join("node.json"), &node.to_string())
}

/// Puts a file in place as editors and `kubectl` do: whole, in one step.
pub fn replace(file: &Path, content: &str) -> Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, content).with_context(|| format!("write {}", new.display()))?;
    fs::rename(&new, file).with_context(|| format!("put {} in place", file.display()))
}

/// The name that Kubernetes has for a protocol.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}
