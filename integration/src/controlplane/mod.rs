//! A real control plane: etcd, kube-apiserver and kube-controller-manager as plain processes in a
//! namespace of their own; kubectl beside them, and kube-proxy on machines that are attached to it.
//!
//! ```no_run
//! use portcullis_integration::controlplane::{ControlPlane, objects};
//! use portcullis_integration::lab::Lab;
//! use serde_json::json;
//!
//! # fn main() -> anyhow::Result<()> {
//! let plane = ControlPlane::shared()?; // one for all tests of this binary
//! let lab = Lab::new(1)?;
//! plane.attach(&lab.node)?; // now `plane.kubeconfig()` works on the node
//! plane.block_on(async |client| {
//!     objects::node(&client, "node-1", &lab.node, &[]).await?;
//!     let namespace = objects::namespace(&client, "shop").await?;
//!     objects::pod(&client, &namespace, "web-0", &[("app", "web")], "node-1", &lab.pods[0]).await?;
//!     objects::service(&client, &namespace, "web", json!({
//!         "selector": {"app": "web"},
//!         "ports": [{"port": 80, "targetPort": 8080}],
//!     })).await?;
//!     objects::wait_for_endpoints(&client, &namespace, "web", 1).await
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! The one user is allowed everything, an account what its roles say. There is no kubelet: nodes and
//! pods are what a test says they are. Of the controllers only those run that make a Service work
//! (`CONTROLLERS`), so `EndpointSlice` objects are made by Kubernetes itself.
//!
//! A test that stops the API server starts a control plane of its own with
//! [`ControlPlane::start`]; the shared one has no way to be stopped. It ends with the process.

mod binaries;
pub mod objects;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tempfile::TempDir;

pub(crate) use binaries::missing;

use crate::lab::{Host, Namespace, Process, SERVICES_V4, SERVICES_V6, scratch};

/// The API server's address, the same from every node.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
/// The API server's port.
pub const PORT: u16 = 6443;

/// What runs in kube-controller-manager. Not node-lifecycle: without kubelets it would find every
/// node dead.
const CONTROLLERS: &str = "endpointslice-controller,garbage-collector-controller,\
                           namespace-controller,service-cidr-controller";
/// The one user's token. It opens nothing but this control plane, inside its namespace.
const TOKEN: &str = "test";
/// How long anything may take to start or to stop.
const LIMIT: Duration = Duration::from_secs(120);
/// Nodes that can be attached: link addresses are in 172.31.1.0/24 to 172.31.250.0/24.
const MAX_NODES: u16 = 62_000;

/// A running control plane. Dropping it ends its processes and removes its data.
#[derive(Debug)]
pub struct ControlPlane {
    // Fields are dropped in this order: clients before servers, data last.
    controllers: Process,
    api_server: Option<Process>,
    _etcd: Process,
    namespace: Namespace,
    binaries: PathBuf,
    attached: AtomicU16,
    directory: TempDir,
}

impl ControlPlane {
    /// The control plane that all tests of this test binary share, started by the first of them.
    /// Tests must use namespaces and node names of their own (see [`objects::namespace`]), and
    /// bear that Services of others exist.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<ControlPlane, String>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| Self::start().map_err(|error| format!("{error:#}")));
        shared.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// Builds the binaries unless that was done before (this takes minutes) and starts a control
    /// plane. When it returns, the API server is ready; the controllers may still be starting.
    pub fn start() -> Result<Self> {
        let binaries = binaries::directory()?;
        let directory = scratch("controlplane")?;
        let namespace = Namespace::new("controlplane")?;
        namespace.ip(&[format!("addr add {ADDRESS}/32 dev lo")])?;
        let path = directory.path();
        fs::write(path.join("tokens.csv"), format!("{TOKEN},admin,admin,system:masters\n"))?;
        fs::write(path.join("kubeconfig"), kubeconfig(&certificates(path), TOKEN))?;
        let etcd = start_etcd(&namespace, &binaries, path)?;
        let mut api_server = start_api_server(&namespace, &binaries, path)?;
        wait_until_ready(&namespace, &mut api_server, &path.join("kubeconfig"))?;
        let controllers = start_controllers(&namespace, &binaries, path)?;
        Ok(Self {
            controllers,
            api_server: Some(api_server),
            _etcd: etcd,
            namespace,
            binaries,
            attached: AtomicU16::new(0),
            directory,
        })
    }

    /// Links a machine to the control plane. From then on the API server can be reached from
    /// there. The link, `api0`, goes with the machine's namespace.
    pub fn attach(&self, host: &Host) -> Result<()> {
        let number = self.attached.fetch_add(1, Ordering::SeqCst);
        ensure!(number < MAX_NODES, "{MAX_NODES} nodes were attached to the control plane");
        let octet = |value: u16| u8::try_from(value).expect("less than 250");
        let address = Ipv4Addr::new(172, 31, 1 + octet(number / 250), 1 + octet(number % 250));
        let link = format!("node{number}");
        self.namespace.ip(&[
            format!("link add {link} type veth peer name api0 netns {}", host.path()),
            format!("link set {link} up"),
            format!("route add {address}/32 dev {link}"),
        ])?;
        host.ip(&[
            format!("addr add {address}/32 dev api0"),
            "link set api0 up".to_owned(),
            format!("route add {ADDRESS}/32 dev api0 src {address}"),
        ])?;
        host.wait_until_reachable(ADDRESS.into())
    }

    /// A kubeconfig that works on every attached machine, as the cluster's administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A kubeconfig for the account `name` in `namespace`, for an hour.
    pub fn kubeconfig_of(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let output = self.kubectl(&["create", "token", "--namespace", namespace, name])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let token = String::from_utf8(output.stdout)?;
        let path = self.directory.path().join(format!("kubeconfig-{namespace}-{name}"));
        fs::write(&path, kubeconfig(&certificates(self.directory.path()), token.trim()))?;
        Ok(path)
    }

    /// Runs kubectl next to the API server, as the cluster's administrator.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(self.binaries.join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .arg("--cache-dir")
            .arg(self.directory.path().join("kubectl"))
            .args(arguments);
        self.namespace.output(command)
    }

    /// Starts kube-proxy for `node` on an attached machine.
    pub fn start_kube_proxy(&self, host: &Host, node: &str, mode: &str) -> Result<Process> {
        let mut command = Command::new(self.binaries.join("kube-proxy"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(["--hostname-override", node])
            .args(["--proxy-mode", mode])
            // The limit of tracked connections is the machine's own.
            .args(["--conntrack-max-per-core", "0", "--conntrack-min", "0"]);
        host.spawn(&command, "kube-proxy", self.directory.path())
    }

    /// Lets kube-proxy remove what it left on a machine, as a process that ends at once.
    pub fn kube_proxy_cleanup(&self, host: &Host) -> Result<Output> {
        let mut command = Command::new(self.binaries.join("kube-proxy"));
        command.arg("--cleanup");
        host.output(command)
    }

    /// A client for the namespace of the calling thread: that of an attached machine.
    pub async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig()).await
    }

    /// Runs `work` with a client, next to the API server, on a runtime of its own. Fails when it
    /// takes more than two minutes.
    pub fn block_on<R: Send>(
        &self,
        work: impl AsyncFnOnce(Client) -> Result<R> + Send,
    ) -> Result<R> {
        self.namespace.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let work = async { work(self.client().await?).await };
                tokio::time::timeout(LIMIT, work).await.context("work with the API server")?
            })
        })
    }

    /// Stops the API server as a rolling upgrade does, with SIGTERM, and waits until it is gone.
    pub fn stop_api_server(&mut self) -> Result<()> {
        let api_server = self.api_server.take().context("the API server is not running")?;
        api_server.terminate(LIMIT).map(drop)
    }

    /// Kills the API server, as a crash would: connections are reset, nothing is said goodbye to.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.api_server.take().context("the API server is not running")?.kill()
    }

    /// Starts the API server again, with the data, address and certificate that it had, and waits
    /// until it is ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        ensure!(self.api_server.is_none(), "the API server is running");
        let path = self.directory.path();
        let mut api_server = start_api_server(&self.namespace, &self.binaries, path)?;
        wait_until_ready(&self.namespace, &mut api_server, &self.kubeconfig())?;
        self.api_server = Some(api_server);
        Ok(())
    }

    /// The last output of the API server and the controllers, for messages.
    pub fn logs(&self) -> String {
        let api_server = self.api_server.as_ref().map(Process::tail).unwrap_or_default();
        format!("{api_server}\n{}", self.controllers.tail())
    }
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig).context("read the kubeconfig")?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default())
        .await
        .context("understand the kubeconfig")?;
    Client::try_from(config).context("make a client of the API server")
}

/// Where the API server keeps its certificate, which it signs itself.
fn certificates(directory: &Path) -> PathBuf {
    directory.join("certificates")
}

fn kubeconfig(certificates: &Path, token: &str) -> String {
    let authority = certificates.join("apiserver.crt");
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: lab
  cluster: {{server: 'https://{ADDRESS}:{PORT}', certificate-authority: '{}'}}
users:
- name: user
  user: {{token: {token}}}
contexts:
- name: lab
  context: {{cluster: lab, user: user}}
current-context: lab
",
        authority.display()
    )
}

fn start_etcd(namespace: &Namespace, binaries: &Path, directory: &Path) -> Result<Process> {
    let mut command = Command::new(binaries.join("etcd"));
    command
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--listen-client-urls", "http://127.0.0.1:2379"])
        .args(["--advertise-client-urls", "http://127.0.0.1:2379"])
        .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
        .args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380"])
        .args(["--initial-cluster", "default=http://127.0.0.1:2380"])
        // The data lives as long as the test.
        .arg("--unsafe-no-fsync");
    let mut etcd = namespace.spawn(&command, "etcd", directory)?;
    etcd.wait_for_output("ready to serve client requests", LIMIT)?;
    Ok(etcd)
}

fn start_api_server(namespace: &Namespace, binaries: &Path, directory: &Path) -> Result<Process> {
    let certificates = certificates(directory);
    // The API server makes this key with its certificate before it reads it for tokens.
    let key = certificates.join("apiserver.key");
    let mut command = Command::new(binaries.join("kube-apiserver"));
    command
        .args(["--etcd-servers", "http://127.0.0.1:2379"])
        .args(["--advertise-address", &ADDRESS.to_string()])
        .args(["--secure-port", &PORT.to_string()])
        .arg("--cert-dir")
        .arg(&certificates)
        .arg("--token-auth-file")
        .arg(directory.join("tokens.csv"))
        .args(["--authorization-mode", "RBAC"])
        .args(["--disable-admission-plugins", "ServiceAccount"])
        .args(["--service-account-issuer", "https://kubernetes.default.svc"])
        .arg("--service-account-key-file")
        .arg(&key)
        .arg("--service-account-signing-key-file")
        .arg(&key)
        // Ends watches when it is told to end. Without it they hold it up for the 60 seconds of
        // --request-timeout.
        .args(["--shutdown-watch-termination-grace-period", "5s"])
        .args(["--service-cluster-ip-range", &format!("{SERVICES_V4},{SERVICES_V6}")]);
    namespace.spawn(&command, "kube-apiserver", directory)
}

fn start_controllers(namespace: &Namespace, binaries: &Path, directory: &Path) -> Result<Process> {
    let mut command = Command::new(binaries.join("kube-controller-manager"));
    command
        .arg("--kubeconfig")
        .arg(directory.join("kubeconfig"))
        .args(["--controllers", CONTROLLERS])
        .args(["--secure-port", "0"])
        .arg("--leader-elect=false")
        // The limits of a real cluster would slow down a test that makes thousands of Services.
        .args(["--kube-api-qps", "1000", "--kube-api-burst", "2000"])
        .args(["--concurrent-service-endpoint-syncs", "20"]);
    namespace.spawn(&command, "kube-controller-manager", directory)
}

/// Waits until the API server says that it is ready.
fn wait_until_ready(
    namespace: &Namespace,
    api_server: &mut Process,
    kubeconfig: &Path,
) -> Result<()> {
    let ask = async || -> Result<()> {
        let request = http::Request::get("/readyz").body(Vec::new())?;
        let client = client(kubeconfig).await?;
        tokio::time::timeout(Duration::from_secs(2), client.request_text(request)).await??;
        Ok(())
    };
    let deadline = Instant::now() + LIMIT;
    loop {
        let Err(error) = namespace.block_on(ask()) else { return Ok(()) };
        if !api_server.is_running() {
            bail!("the API server ended\n{}", api_server.tail());
        }
        if Instant::now() > deadline {
            return Err(error).with_context(|| {
                format!("the API server is not ready after {LIMIT:?}\n{}", api_server.tail())
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
