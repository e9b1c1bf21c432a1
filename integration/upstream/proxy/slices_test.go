//go:build upstream

package proxy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"portcullis.dev/integration/upstream/record"
)

// A history is what a proxy is told of slices, and which endpoints it knows of by that.
type history struct {
	Test  string `json:"test"`
	Line  string `json:"line"`
	Node  string `json:"node"`
	Steps []step `json:"steps"`
}

type step struct {
	Slices []*discovery.EndpointSlice `json:"slices"`
	// Names of slices that go.
	Removed []string `json:"removed,omitempty"`
	// The Service that is looked at; all where none is named.
	Service   string  `json:"service,omitempty"`
	Endpoints []known `json:"endpoints"`
	// How many addresses on the node are ready, of each Service that has one; null where nobody
	// looks.
	LocalReady map[string]int `json:"localReady"`
	// The Services whose endpoints change by the step; null where nobody looks.
	Changed []string `json:"changed"`
}

// A known is an endpoint of a Service port.
type known struct {
	Service     string `json:"service"`
	Port        string `json:"port"`
	Protocol    string `json:"protocol"`
	Address     string `json:"address"`
	Local       bool   `json:"local"`
	Ready       bool   `json:"ready"`
	Serving     bool   `json:"serving"`
	Terminating bool   `json:"terminating"`
}

// An alteration is a slice, another one in its place, and whether that makes a difference.
type alteration struct {
	Test    string                   `json:"test"`
	Line    string                   `json:"line"`
	Before  *discovery.EndpointSlice `json:"before"`
	After   *discovery.EndpointSlice `json:"after"`
	Changed bool                     `json:"changed"`
}

const (
	cacheTests   = "endpointslicecache_test.go"
	trackerTests = "endpointschangetracker_test.go"
)

func recordMap(
	t *testing.T, line int, node string, service types.NamespacedName,
	slices []*discovery.EndpointSlice, expected map[ServicePortName][]*BaseEndpointInfo,
) {
	record.Write(t, history{record.Test(t), at(cacheTests, line), node, []step{
		{Slices: slices, Service: service.String(), Endpoints: endpoints(expected)},
	}})
}

func recordByPort(
	t *testing.T, line int, node string, service types.NamespacedName,
	slices []*discovery.EndpointSlice, expected spToEndpointMap,
) {
	flat := map[ServicePortName][]*BaseEndpointInfo{}
	for port, byAddress := range expected {
		for _, endpoint := range byAddress {
			flat[port] = append(flat[port], endpoint.(*BaseEndpointInfo))
		}
	}
	recordMap(t, line, node, service, slices, flat)
}

func recordUpdate(
	t *testing.T, line int, before, after []*discovery.EndpointSlice,
	expectedBefore, expectedAfter map[ServicePortName][]*BaseEndpointInfo,
	localReady map[types.NamespacedName]int, changed sets.Set[types.NamespacedName],
) {
	first := step{Slices: present(before), Endpoints: endpoints(expectedBefore)}
	second := step{
		Slices:     present(after),
		Endpoints:  endpoints(expectedAfter),
		LocalReady: map[string]int{},
		Changed:    []string{},
	}
	for number, slice := range before {
		if slice != nil && after[number] == nil {
			second.Removed = append(second.Removed, slice.Namespace+"/"+slice.Name)
		}
	}
	for service, count := range localReady {
		second.LocalReady[service.String()] = count
	}
	for service := range changed {
		second.Changed = append(second.Changed, service.String())
	}
	slices.Sort(second.Changed)
	record.Write(t, history{
		record.Test(t), at(trackerTests, line), testHostname, []step{first, second},
	})
}

func recordAlteration(
	t *testing.T, line int, before, after *discovery.EndpointSlice, changed bool,
) {
	record.Write(t, alteration{record.Test(t), at(cacheTests, line), before, after, changed})
}

func at(file string, line int) string {
	return fmt.Sprintf("%s:%d", file, line)
}

// present returns those that are not nil.
func present(all []*discovery.EndpointSlice) []*discovery.EndpointSlice {
	some := []*discovery.EndpointSlice{}
	for _, slice := range all {
		if slice != nil {
			some = append(some, slice)
		}
	}
	return some
}

// endpoints returns them by Service, port and address; never nil, which would be written as null.
func endpoints(byPort map[ServicePortName][]*BaseEndpointInfo) []known {
	all := []known{}
	for port, endpoints := range byPort {
		for _, endpoint := range endpoints {
			all = append(all, known{
				Service:     port.NamespacedName.String(),
				Port:        port.Port,
				Protocol:    string(port.Protocol),
				Address:     endpoint.String(),
				Local:       endpoint.IsLocal(),
				Ready:       endpoint.IsReady(),
				Serving:     endpoint.IsServing(),
				Terminating: endpoint.IsTerminating(),
			})
		}
	}
	slices.SortFunc(all, func(a, b known) int {
		return cmp.Or(
			strings.Compare(a.Service, b.Service),
			strings.Compare(a.Port, b.Port),
			strings.Compare(a.Protocol, b.Protocol),
			strings.Compare(a.Address, b.Address),
		)
	})
	return all
}
