//go:build upstream

// Our part of upstream's package: it writes down what a case is given and what it expects. The
// rest of the package comes from upstream's module, by way of an overlay.
package proxy

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
)

// A categorization is a case of the table of CategorizeEndpoints.
type categorization struct {
	Test string `json:"test"`
	Line string `json:"line"`
	Node node   `json:"node"`
	// Whether the feature of hints for nodes is on.
	NodeHints bool       `json:"nodeHintsEnabled"`
	Service   service    `json:"service"`
	Endpoints []endpoint `json:"endpoints"`
	Expected  expected   `json:"expected"`
}

type node struct {
	Name string  `json:"name"`
	Zone *string `json:"zone"`
}

type service struct {
	Internal string `json:"internalTrafficPolicy"`
	External string `json:"externalTrafficPolicy"`
	NodePort int    `json:"nodePort"`
}

type endpoint struct {
	Address     string   `json:"address"`
	Local       bool     `json:"local"`
	Ready       bool     `json:"ready"`
	Serving     bool     `json:"serving"`
	Terminating bool     `json:"terminating"`
	ZoneHints   []string `json:"zoneHints,omitempty"`
	NodeHints   []string `json:"nodeHints,omitempty"`
}

// What is expected: which endpoints serve with each policy (null where the table does not say that
// the Service uses any by it), which in all, and whether there is any on whatever node.
type expected struct {
	Cluster []string `json:"cluster"`
	Local   []string `json:"local"`
	All     []string `json:"all"`
	Any     bool     `json:"any"`
}

// How many cases were recorded.
var recorded int

func recordCategorization(
	t *testing.T, lines []int, nodeName string, labels map[string]string, nodeHints bool,
	port ServicePort, endpoints []Endpoint, cluster, local, all sets.Set[string], any bool,
) {
	test, _, _ := strings.Cut(t.Name(), "/")
	one := categorization{
		Test:      test,
		Line:      fmt.Sprintf("topology_test.go:%d", lines[recorded]),
		Node:      node{Name: nodeName},
		NodeHints: nodeHints,
		Service: service{
			Internal: policy(port.InternalPolicyLocal()),
			External: policy(port.ExternalPolicyLocal()),
			NodePort: port.NodePort(),
		},
		Endpoints: []endpoint{},
		Expected:  expected{list(cluster), list(local), list(all), any},
	}
	if zone, ok := labels[v1.LabelTopologyZone]; ok {
		one.Node.Zone = &zone
	}
	if len(port.ExternalIPs())+len(port.LoadBalancerVIPs()) > 0 {
		t.Fatal("the facts have no place for external addresses")
	}
	for _, known := range endpoints {
		one.Endpoints = append(one.Endpoints, endpoint{
			Address:     known.String(),
			Local:       known.IsLocal(),
			Ready:       known.IsReady(),
			Serving:     known.IsServing(),
			Terminating: known.IsTerminating(),
			ZoneHints:   list(known.ZoneHints()),
			NodeHints:   list(known.NodeHints()),
		})
	}
	recorded++
	write(t, one)
}

func policy(local bool) string {
	if local {
		return string(v1.ServiceExternalTrafficPolicyLocal)
	}
	return string(v1.ServiceExternalTrafficPolicyCluster)
}

func list(set sets.Set[string]) []string {
	if set == nil {
		return nil
	}
	return sets.List(set)
}

func write(t *testing.T, one any) {
	line, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(
		os.Getenv("UPSTREAM_RECORD"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := fmt.Fprintf(file, "%s\n", line); err != nil {
		t.Fatal(err)
	}
}
